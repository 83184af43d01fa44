"""Files: raw data to the HDF5 schema, and foreign weights to an encoder. Imports harness and model alone."""
