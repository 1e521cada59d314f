// The seed of a randomised test: printed, and repeated by KVRELAY_SEED=<seed>.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <random>
#include <string>

namespace kvrelay::testing_support {

inline uint64_t TestSeed() {
  const char* given = std::getenv("KVRELAY_SEED");
  const uint64_t seed =
      given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
  std::cout << "KVRELAY_SEED=" << seed << std::endl;
  return seed;
}

using Random = std::mt19937_64;

// Uniform in [least, most].
inline uint32_t Pick(Random& random, uint32_t least, uint32_t most) {
  return std::uniform_int_distribution<uint32_t>(least, most)(random);
}

}  // namespace kvrelay::testing_support
