// A number that the environment may give: a seed, or how many random cases to try.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace kvrelay::tests {

inline uint64_t FromEnv(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

}  // namespace kvrelay::tests
