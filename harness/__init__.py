"""How a run is set up, recorded and resumed, and how a mistake becomes one line. Knows no molecule and no network."""
