#include "transport/ucx_worker.h"

#include <dlfcn.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <sys/socket.h>
#include <ucm/api/ucm.h>
#include <ucs/config/global_opts.h>
#include <unistd.h>

#include <mutex>
#include <utility>
#include <vector>

namespace kvrelay::transport {
namespace {

Status UcxError(const std::string& what, ucs_status_t status) {
  return Status(Code::kInternal, what + ": " + ucs_status_string(status));
}

// UCX logs errors on the caller's stderr on its own account, for example when a peer is killed,
// which is daily business here and comes back as a status.
void QuietLog() {
  static std::once_flag once;
  std::call_once(once, [] { ucs_global_opts_set_value("LOG_LEVEL", "fatal"); });
}

using UcxOptions = std::vector<std::pair<const char*, std::string>>;

Result<ucp_context_h> Init(const char* name, uint64_t features, const UcxOptions& options) {
  QuietLog();
  ucp_config_t* config = nullptr;
  if (const ucs_status_t status = ucp_config_read(nullptr, nullptr, &config); status != UCS_OK) {
    return Error(UcxError("ucp_config_read", status));
  }
  for (const auto& [option, value] : options) {
    // Releases of UCX know different options: what one does not know it does not need.
    (void)ucp_config_modify(config, option, value.c_str());
  }
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
  params.features = features;
  params.name = name;
  ucp_context_h context = nullptr;
  const ucs_status_t status = ucp_init(&params, config, &context);
  ucp_config_release(config);
  if (status == UCS_OK) return context;
  return Error(UcxError("UCX has nothing that works over " + options.front().second +
                            " on interface " + options.at(1).second,
                        status));
}

}  // namespace

Status CheckInterface(const std::string& interface) {
  if (if_nametoindex(interface.c_str()) == 0) {
    return Error(Code::kInvalidArgument, "there is no network interface " + interface + " here");
  }
  // UCX looks for interfaces there, and a container's /sys may still be that of its host.
  if (access(("/sys/class/net/" + interface).c_str(), F_OK) != 0) {
    return Error(Code::kInvalidArgument, "/sys/class/net does not show the network interface " +
                                             interface +
                                             ": /sys is that of another network namespace");
  }
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return Error(Code::kInternal, "getifaddrs failed");
  bool up = false;
  bool has_address = false;
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (interface != entry->ifa_name) continue;
    up |= (entry->ifa_flags & IFF_UP) != 0;
    has_address |= entry->ifa_addr != nullptr && (entry->ifa_addr->sa_family == AF_INET ||
                                                  entry->ifa_addr->sa_family == AF_INET6);
  }
  freeifaddrs(list);
  if (!up) return Error(Code::kInvalidArgument, "the network interface " + interface + " is down");
  if (!has_address) {
    return Error(Code::kInvalidArgument, "the network interface " + interface + " has no address");
  }
  return {};
}

Result<std::shared_ptr<UcxContext>> UcxContext::CreatePacked(const UcxSettings& settings) {
  KVRELAY_RETURN_IF_ERROR(CheckInterface(settings.interface));
  const std::string segment = std::to_string(settings.segment_bytes());
  KVRELAY_ASSIGN_OR_RETURN(
      const ucp_context_h context,
      Init("kvrelay-packed", UCP_FEATURE_AM | UCP_FEATURE_WAKEUP,
           {
               // TCP only: it works between any two namespaces and needs no /dev/shm. Where two
               // processes
               // share more than a network,
               // `mapped` is faster than anything that UCX could add.
               {"TLS", "tcp"},
               {"NET_DEVICES", settings.interface},
               // Each message is one eager segment: nothing of a cancelled stream is ever in flight
               // into
               // memory of ours, and a chunk
               // that fits the cache is unpacked right out of the receive buffer. In error mode
               // PEER UCX
               // would otherwise cut
               // messages into pieces of 8 KiB (0.9 GB/s instead of 3 to 5 on loopback).
               {"TCP_TX_SEG_SIZE", segment},
               {"TCP_RX_SEG_SIZE", segment},
               {"RNDV_THRESH", "inf"},
               // UCX's newer protocol selection asks the interface for its properties 142 times,
               // each time
               // by
               // a walk through /sys, before it creates its first endpoint (20 to 60 ms; without
               // it 1.7 ms).
               {"PROTO_ENABLE", "n"},
               // Defaults, against the user's environment.
               {"BCOPY_THRESH", "auto"},
               {"ZCOPY_THRESH", "auto"},
               {"KEEPALIVE_INTERVAL", "20s"},
               {"ADDRESS_VERSION", "auto"},
               {"TCP_PORT_RANGE", "0"},
               {"TCP_PREFER_DEFAULT", "y"},
               {"TCP_NODELAY", "y"},
               {"TCP_SNDBUF", "auto"},
               {"TCP_RCVBUF", "auto"},
               {"TCP_PUT_ENABLE", "n"},
               {"TCP_CONN_NB", "n"},
               {"TCP_MAX_CONN_RETRIES", "25"},
               {"TCP_AF_PRIO", "inet,inet6"},
           }));
  return std::shared_ptr<UcxContext>(new UcxContext(context));
}

Result<std::shared_ptr<UcxContext>> UcxContext::CreateOneSided(const OneSidedLanes& lanes) {
  KVRELAY_ASSIGN_OR_RETURN(
      const ucp_context_h context,
      Init("kvrelay-get", UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP,
           {
               {"TLS", lanes.transports},
               {"NET_DEVICES", lanes.devices},
               // Otherwise a GET in error mode PEER goes through the owner's processor.
               {"RNDV_THRESH", "inf"},
               {"PROTO_ENABLE", "y"},
               {"PROTO_EMULATION_ENABLE", "n"},
               // Shared memory carries the greeting of two workers only; without these it does not
               // go with error mode PEER.
               {"POSIX_ERROR_HANDLING", "y"},
               {"SYSV_ERROR_HANDLING", "y"},
               {"KEEPALIVE_INTERVAL", "1s"},
               // Defaults, against the user's environment.
               {"ZCOPY_THRESH", "auto"},
               {"BCOPY_THRESH", "auto"},
               {"CMA_TX_QUOTA", "8"},
               {"ADDRESS_VERSION", "auto"},
           }));
  return std::shared_ptr<UcxContext>(new UcxContext(context));
}

Result<std::shared_ptr<UcxWorker>> UcxWorker::Create(std::shared_ptr<UcxContext> context) {
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SERIALIZED;  // created on one thread, used on another
  ucp_worker_h handle = nullptr;
  if (const ucs_status_t status = ucp_worker_create(context->get(), &params, &handle);
      status != UCS_OK) {
    return Error(UcxError("ucp_worker_create", status));
  }
  return std::shared_ptr<UcxWorker>(new UcxWorker(std::move(context), handle));
}

Status UcxWorker::Receive(OnMessage on_message, OnForeign on_foreign) {
  on_message_ = std::move(on_message);
  on_foreign_ = std::move(on_foreign);
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                       UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kUcxMessageId;
  handler.flags = UCP_AM_FLAG_WHOLE_MSG;
  handler.cb = &UcxWorker::OnActiveMessage;
  handler.arg = this;
  const ucs_status_t status = ucp_worker_set_am_recv_handler(worker_, &handler);
  return status == UCS_OK ? Status::Ok() : UcxError("ucp_worker_set_am_recv_handler", status);
}

void UcxWorker::Flush(std::function<void()> flushed) {
  auto pending = std::make_unique<std::function<void()>>(std::move(flushed));
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = [](void* request, ucs_status_t, void* context) {
    ucp_request_free(request);
    const std::unique_ptr<std::function<void()>> done(static_cast<std::function<void()>*>(context));
    (*done)();
  };
  param.user_data = pending.get();
  if (UCS_PTR_IS_PTR(ucp_worker_flush_nbx(worker_, &param))) {
    (void)pending.release();  // the callback owns it
  } else {
    (*pending)();
  }
}

Result<std::string> UcxWorker::Address() const {
  ucp_address_t* address = nullptr;
  size_t bytes = 0;
  if (const ucs_status_t status = ucp_worker_get_address(worker_, &address, &bytes);
      status != UCS_OK) {
    return Error(UcxError("ucp_worker_get_address", status));
  }
  std::string copy(reinterpret_cast<const char*>(address), bytes);
  ucp_worker_release_address(worker_, address);
  return copy;
}

Result<int> UcxWorker::EventFd() const {
  int fd = -1;
  if (const ucs_status_t status = ucp_worker_get_efd(worker_, &fd); status != UCS_OK) {
    return Error(UcxError("ucp_worker_get_efd", status));
  }
  return fd;
}

ucs_status_t UcxWorker::OnActiveMessage(void* self, const void* header, size_t header_bytes,
                                        void* data, size_t bytes,
                                        const ucp_am_recv_param_t* param) {
  const auto* worker = static_cast<const UcxWorker*>(self);
  if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0) {
    worker->on_foreign_();
  } else {
    worker->on_message_({static_cast<const std::byte*>(header), header_bytes},
                        {static_cast<const std::byte*>(data), bytes});
  }
  return UCS_OK;  // we keep nothing: UCX takes its buffer back, and answers a rendezvous without
                  // fetching it
}

}  // namespace kvrelay::transport

// UCX calls this from its constructor, before main. On the way through here it is told not to patch
// mmap, munmap and their like in the machine code of libc, which takes it 0.4 s in every process
// that links it, the command line included. It would want to see mappings come and go for
// registered memory; TCP registers none. (In a process that loads us as a plugin UCX finds its own
// function.)
extern "C" void ucm_set_global_opts(const ucm_global_config_t* ucm_opts) {
  using Function = void (*)(const ucm_global_config_t*);
  const auto original = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "ucm_set_global_opts"));
  ucm_global_config_t changed = *ucm_opts;
  changed.mmap_hook_mode = UCM_MMAP_HOOK_NONE;
  original(&changed);
}
