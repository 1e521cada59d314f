// A benchmark program ends at its first failure, and says which.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <iostream>
#include <string>
#include <utility>

#include "base/status.h"

namespace kvrelay::bench {

inline void Check(bool ok, const std::string& what) {
  if (ok) return;
  std::cerr << program_invocation_short_name << ": " << what << "\n";
  _exit(1);
}

template <typename T>
T Must(Result<T> result) {
  Check(result.has_value(), result.has_value() ? "" : result.error().ToString());
  return std::move(*result);
}

}  // namespace kvrelay::bench
