#include "base/thread_checker.h"

#include <glog/logging.h>

#include <cstdlib>

namespace kvrelay {

void FailThreadCheck(const char* checker, const char* function) {
  LOG(FATAL) << function << " was called on another thread than that of " << checker;
  std::abort();
}

}  // namespace kvrelay
