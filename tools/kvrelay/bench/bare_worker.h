// UCX with nothing of ours around it: a context, its worker and at most one endpoint.
#pragma once

#include <ucp/api/ucp.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"

namespace kvrelay::tools {

// kInternal with what failed, unless `status` is UCS_OK.
Status CheckUcx(ucs_status_t status, const char* what);

// One thread at a time.
class BareWorker {
 public:
  using Settings = std::vector<std::pair<const char*, std::string>>;  // without UCX_

  static Result<std::unique_ptr<BareWorker>> Create(uint64_t features, const Settings& settings);
  ~BareWorker();  // closes the endpoint by force
  BareWorker(const BareWorker&) = delete;
  BareWorker& operator=(const BareWorker&) = delete;

  ucp_context_h context() const { return context_; }
  ucp_worker_h get() const { return worker_; }
  ucp_ep_h endpoint() const { return endpoint_; }

  Result<std::string> Address() const;
  Status Connect(const std::string& address, ucp_err_handling_mode_t errors);
  void Progress() { ucp_worker_progress(worker_); }
  // Until all that was posted to the endpoint is done; kInternal after a minute.
  Status Flush();

 private:
  BareWorker() = default;

  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  ucp_ep_h endpoint_ = nullptr;
};

}  // namespace kvrelay::tools
