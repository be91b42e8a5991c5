"""`python -m xray_kernels` prints which implementation of every op runs on which device, and the facts of the build."""

from xray_kernels.info import report

print(report())
