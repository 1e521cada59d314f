#include "engine/read_linear.h"

#include <algorithm>

namespace kvrelay::engine {

Status ReadRows(const Checkpoint& checkpoint, const std::string& name, uint64_t all_rows,
                uint64_t columns, uint64_t begin, uint64_t count, std::span<float> out) {
  return checkpoint.ReadMatrix(
      name, all_rows, columns,
      {.row_begin = begin, .rows = count, .column_begin = 0, .columns = columns}, out);
}

Status ReadOutputs(const Checkpoint& checkpoint, const std::string& name, const Part& outputs,
                   size_t first, Linear& out) {
  KVRELAY_RETURN_IF_ERROR(ReadRows(checkpoint, name + ".weight", outputs.all, out.weights.columns,
                                   outputs.begin, outputs.count,
                                   out.weights.Rows(first, outputs.count)));
  if (out.bias.empty()) return Status::Ok();
  std::vector<float> bias(outputs.all);
  KVRELAY_RETURN_IF_ERROR(checkpoint.ReadVector(name + ".bias", bias));
  std::copy_n(bias.begin() + static_cast<ptrdiff_t>(outputs.begin), outputs.count,
              out.bias.begin() + static_cast<ptrdiff_t>(first));
  return Status::Ok();
}

Result<Linear> ReadInputs(const Checkpoint& checkpoint, const std::string& name, uint64_t outputs,
                          const Part& inputs, bool with_bias) {
  Linear out(outputs, inputs.count, with_bias);
  KVRELAY_RETURN_IF_ERROR(checkpoint.ReadMatrix(
      name + ".weight", outputs, inputs.all,
      {.row_begin = 0, .rows = outputs, .column_begin = inputs.begin, .columns = inputs.count},
      out.weights.values));
  if (with_bias) KVRELAY_RETURN_IF_ERROR(checkpoint.ReadVector(name + ".bias", out.bias));
  return out;
}

Status ReadNorm(const Checkpoint& checkpoint, const std::string& name, uint32_t width,
                std::vector<float>& out) {
  out.resize(width);
  return checkpoint.ReadVector(name, out);
}

}  // namespace kvrelay::engine
