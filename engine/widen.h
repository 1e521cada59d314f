// Stored weights to fp32.
#pragma once

#include <span>

#include "engine/tensor_file.h"

namespace kvrelay::engine {

// `bytes` (any alignment) holds out.size() elements of `type`, which is not kOther.
void Widen(TensorType type, std::span<const std::byte> bytes, std::span<float> out);

}  // namespace kvrelay::engine
