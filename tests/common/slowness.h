// How much slower this build is than a release build: tests that set bounds of their own multiply
// by it.
#pragma once

namespace kvrelay::tests {

constexpr int Slowness() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return 5;
#else
  return 1;
#endif
}

}  // namespace kvrelay::tests
