#include "engine/widen.h"

#include <cstring>

#include "engine/half.h"

namespace kvrelay::engine {
namespace {

template <typename Convert>
void WidenHalves(std::span<const std::byte> bytes, std::span<float> out, Convert convert) {
  for (size_t i = 0; i < out.size(); ++i) {
    uint16_t bits = 0;
    std::memcpy(&bits, bytes.data() + i * sizeof(bits), sizeof(bits));
    out[i] = convert(bits);
  }
}

}  // namespace

void Widen(TensorType type, std::span<const std::byte> bytes, std::span<float> out) {
  switch (type) {
    case TensorType::kFp32:
      std::memcpy(out.data(), bytes.data(), out.size_bytes());
      return;
    case TensorType::kFp16:
      return WidenHalves(bytes, out, FloatFromHalf);
    case TensorType::kBf16:
      return WidenHalves(bytes, out, FloatFromBf16);
    case TensorType::kOther:
      return;
  }
}

}  // namespace kvrelay::engine
