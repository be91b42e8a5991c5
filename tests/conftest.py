"""Settings that must stand before torch is imported."""

import os

# OpenMP threads that wait sleep instead of spinning, so that tests which start processes do not starve them
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
