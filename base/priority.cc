#include "base/priority.h"

#include <string>

namespace kvrelay {

std::string_view PriorityName(Priority priority) {
  return priority == Priority::kPrefetch ? "prefetch" : "decode";
}

Result<Priority> PriorityFromName(std::string_view name) {
  for (const Priority priority : {Priority::kPrefetch, Priority::kDecode}) {
    if (name == PriorityName(priority)) return priority;
  }
  return Error(Code::kInvalidArgument,
               "'" + std::string(name) + "' is no priority: prefetch or decode");
}

}  // namespace kvrelay
