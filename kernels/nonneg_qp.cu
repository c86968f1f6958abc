// Nonnegative quadratic programs on a GPU: one launch of one warp, or of one block where T is larger than a warp.
#include "../csrc/nonneg_qp.cpp"
