// The Gram matrix of rows on a GPU, for the ops that need one.
#pragma once

#include <optional>
#include <vector>

#include "device.cuh"
#include "fastmtl/launch_plan.h"
#include "fastmtl/row_table.h"

namespace fastmtl {

/// J J^T of the rows, or one matrix for each group of parameters; (T, T) or (L, T, T) float64.
Tensor gram_of_rows(TensorList const& flat, int64_t num_rows, std::optional<std::vector<int64_t>> const& groups);

/// result (+)= the Gram matrices, by group, of a launch whose blocks left the sums of pairs in `partial`.
void reduce_gram(OnDevice const& on, GroupRuns const& runs, int rows, int64_t blocks, double const* partial, bool add,
                 Tensor& result);

}  // namespace fastmtl
