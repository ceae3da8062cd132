"""What all forms of the layer must agree in: compositions, CPU kernels, Triton kernels."""

# RMSNorm's epsilon.
EPS = 1e-6
# A mean of n unit rows has size n^-1/2; that of a box head is scaled back up to this n.
BOX_SCALE = 16
# Kinds of heads in the order in which a layer has them, for kernels and the tables of their buffers.
NOW: int = 0
ANCHORED: int = 1
BOX: int = 2
