// watch_ on a GPU: one launch of one warp, or of one block where T is larger than a warp.
#include "../csrc/watch.cpp"
