"""Make ethanol_demo.h5: 1,000 geometries of hot ethanol with the energies and forces of GFN2-xTB.

    pip install "tblite>=0.8" "ase>=3.29"
    OMP_NUM_THREADS=1 python data/make_ethanol.py [OUT.h5]        5 minutes on one core

Langevin dynamics at 500 K in steps of 0.5 fs; after 2 ps of equilibration a frame every 50 fs. By then the
autocorrelation is 0.26 for the energy and -0.25 for the forces, below 0.1 for both at 200 fs; the torsions take
picoseconds. Frames stand in the order of time, and a random split between training and test mixes neighbours: fine for
a demo, easier than a test on another trajectory.

The file in this repository was made with tblite 0.8.0 and ase 3.29.0. The seed repeats it on the same machine;
elsewhere rounding leads to other frames of the same ensemble.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from ase import units
from ase.build import molecule
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from tblite.ase import TBLite

sys.path.insert(0, str(Path(__file__).parent.parent))
from formats.sources import EV
from formats.write import save
from harness.errors import cli
from harness.files import check_new

FRAMES, EVERY, EQUILIBRATION = 1000, 100, 4000  # the last two in steps
TIMESTEP, TEMPERATURE, FRICTION = 0.5, 500, 0.01  # fs, K, 1/fs
SEED = 1


def frames():
    """Molecules as formats.write takes them, one per EVERY steps of the trajectory."""
    rng = np.random.default_rng(SEED)
    atoms = molecule("CH3CH2OH")
    atoms.calc = TBLite(method="GFN2-xTB", accuracy=0.1, verbosity=0)
    thermalize_momenta(atoms, TEMPERATURE, rng=rng)
    thermostat = {"temperature_K": TEMPERATURE, "friction": FRICTION / units.fs, "fixcm": False, "rng": rng}
    dynamics = Langevin(atoms, TIMESTEP * units.fs, **thermostat)
    dynamics.run(EQUILIBRATION)
    for k in range(FRAMES):
        dynamics.run(EVERY)
        pos = atoms.positions - atoms.get_center_of_mass()  # the thermostat lets the molecule drift
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        yield {"id": k, "z": atoms.numbers, "pos": pos, "labels": labels}


def main(argv):
    out = Path(argv[0]) if argv else Path(__file__).with_name("ethanol_demo.h5")
    check_new(out, kinds=(".h5",))
    packages = f"tblite {version('tblite')} and ase {version('ase')}"
    attrs = {
        "name": f"ethanol, GFN2-xTB, {TEMPERATURE} K, {FRAMES} frames",
        "source": f"GFN2-xTB by {packages}: Langevin dynamics, a frame every {EVERY * TIMESTEP:g} fs, seed {SEED}",
        "command": f"python data/make_ethanol.py {out.name}",
        "license": "CC0 1.0",
        "attribution": "made for this repository; GFN2-xTB: C. Bannwarth et al., JCTC 15, 1652 (2019)",
    }
    save(out, frames(), attrs, EV)


if __name__ == "__main__":
    cli(main, __doc__)
