// A model's weights by name: one model.safetensors, or the shards that model.safetensors.index.json
// lists.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/tensor_file.h"

namespace kvrelay::engine {

// Move-only. Const calls from several threads are fine.
class Checkpoint {
 public:
  // kNotFound when the folder holds neither file; kInvalidArgument for a damaged file, a shard name
  // that leaves the folder, or a tensor that its shard does not have.
  static Result<Checkpoint> Open(const std::string& model_dir);
  // Has every tensor that is asked for, of numbers that only its name and their places decide: of
  // the size that training leaves them, vectors 1 unless they are biases. tensors() is empty.
  static Checkpoint Dummy();

  const std::map<std::string, const TensorInfo*>& tensors() const { return tensors_; }

  // Copies the box rows [row_begin, row_begin + rows) x columns [column_begin, column_begin +
  // columns) of a matrix to `out` (row-major, rows * columns), as fp32. kInvalidArgument, naming
  // the tensor, when it is absent, is no `all_rows` x `all_columns` matrix, or is not stored as
  // F32, F16 or BF16.
  struct Box {
    uint64_t row_begin = 0;
    uint64_t rows = 0;
    uint64_t column_begin = 0;
    uint64_t columns = 0;
  };
  Status ReadMatrix(const std::string& name, uint64_t all_rows, uint64_t all_columns,
                    const Box& box, std::span<float> out) const;
  // A vector of `out.size()` elements, whole.
  Status ReadVector(const std::string& name, std::span<float> out) const;

 private:
  Checkpoint() = default;
  Result<const TensorInfo*> Find(const std::string& name, const std::vector<uint64_t>& shape) const;

  bool dummy_ = false;
  std::vector<TensorFile> files_;
  std::map<std::string, const TensorInfo*> tensors_;  // into files_
};

}  // namespace kvrelay::engine
