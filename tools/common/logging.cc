#include "tools/common/logging.h"

#include <glog/logging.h>

namespace kvrelay::tools {

void AddLogFlag(FlagSet& flags, std::string* level) {
  flags.Choice("log_level", level, {"debug", "info", "warning", "error"},
               "least severe log lines written to stderr");
}

void StartLogging(const char* program, const std::string& level) {
  FLAGS_logtostderr = true;
  FLAGS_minloglevel = level == "error"     ? google::GLOG_ERROR
                      : level == "warning" ? google::GLOG_WARNING
                                           : google::GLOG_INFO;
  FLAGS_v = level == "debug" ? 1 : 0;
  google::InitGoogleLogging(program);
}

}  // namespace kvrelay::tools
