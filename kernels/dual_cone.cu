// Projections onto the dual cone on a GPU: one launch, a warp or a block for each target.
#include "../csrc/dual_cone.cpp"
