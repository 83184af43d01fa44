"""Other objectives and backbones, a file each: every one is the example of a fork."""
