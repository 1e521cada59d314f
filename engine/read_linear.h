// Reads linear layers, or the parts of them that a tensor-parallel rank has, out of a checkpoint.
// All errors are the checkpoint's, which name the tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/checkpoint.h"
#include "engine/matrix.h"

namespace kvrelay::engine {

// Of the outputs or inputs of a linear layer those that a rank has.
struct Part {
  uint64_t all;
  uint64_t begin;
  uint64_t count;
};

// Rows [begin, begin + count) of a weight matrix into `out`.
Status ReadRows(const Checkpoint& checkpoint, const std::string& name, uint64_t all_rows,
                uint64_t columns, uint64_t begin, uint64_t count, std::span<float> out);

// A part of a layer's outputs, to the outputs of `out` from `first` on (column-parallel).
Status ReadOutputs(const Checkpoint& checkpoint, const std::string& name, const Part& outputs,
                   size_t first, Linear& out);

// A part of a layer's inputs (row-parallel).
Result<Linear> ReadInputs(const Checkpoint& checkpoint, const std::string& name, uint64_t outputs,
                          const Part& inputs, bool with_bias);

Status ReadNorm(const Checkpoint& checkpoint, const std::string& name, uint32_t width,
                std::vector<float>& out);

}  // namespace kvrelay::engine
