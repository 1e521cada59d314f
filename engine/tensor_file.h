// The tensors of one .safetensors file, mapped read-only. The header is checked completely before
// anything is read: a file that is shorter than its header says is refused, never a SIGBUS (unless
// somebody truncates it while it is being loaded).
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/mapping.h"
#include "base/status.h"

namespace kvrelay::engine {

enum class TensorType : uint8_t { kFp32, kFp16, kBf16, kOther };

struct TensorInfo {
  TensorType type = TensorType::kOther;
  std::string type_name;            // "BF16", as the file says
  std::vector<uint64_t> shape;      // row-major
  std::span<const std::byte> data;  // may be unaligned; valid while the file object lives

  uint64_t elements() const;
  std::string ToString() const;  // "BF16 [64, 128]"
};

// Move-only. Reading from several threads is fine.
class TensorFile {
 public:
  // kNotFound when absent; kInvalidArgument, naming the file and what disagrees, when it is
  // damaged.
  static Result<TensorFile> Open(const std::string& path);

  const std::map<std::string, TensorInfo, std::less<>>& tensors() const { return tensors_; }
  const std::string& path() const { return path_; }

 private:
  TensorFile() = default;
  Status ParseHeader(std::string_view header, std::span<const std::byte> data);

  std::string path_;
  Mapping mapping_;
  std::map<std::string, TensorInfo, std::less<>> tensors_;
};

}  // namespace kvrelay::engine
