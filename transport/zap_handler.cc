#include "transport/zap_handler.h"

#include <glog/logging.h>

#include <algorithm>
#include <string_view>
#include <utility>

namespace kvrelay::transport {
namespace {

// version, request id, domain, address, identity, mechanism, credentials
constexpr size_t kRequestFrames = 7;

}  // namespace

Result<ZapHandler> ZapHandler::Create(std::shared_ptr<ZmqContext> context,
                                      std::shared_ptr<const CurveIdentity> identity) {
  KVRELAY_ASSIGN_OR_RETURN(ZmqSocket socket, ZmqSocket::Create(std::move(context), ZMQ_REP, {}));
  if (const auto bound = socket.Bind("inproc://zeromq.zap.01"); !bound) return Error(bound.error());
  return ZapHandler(std::move(socket), std::move(identity));
}

size_t ZapHandler::Serve() {
  size_t refused = 0;
  while (const auto request = socket_.Receive(kRequestFrames)) {
    CurveKey key{};
    bool allowed = false;
    if (request->frames.size() == kRequestFrames && request->frames[5] == "CURVE" &&
        request->frames[6].size() == key.size()) {
      std::ranges::copy(request->frames[6], key.begin());
      allowed = identity_->Allows(key);
    }
    if (!allowed) {
      ++refused;
      LOG_EVERY_T(WARNING, 1) << "refused a connection from "
                              << (request->frames.size() > 3 ? request->frames[3] : "somebody")
                              << ": its key " << KeyToText(key) << " is not allowed";
    }
    const std::string_view id =
        request->frames.size() > 1 ? std::string_view(request->frames[1]) : "";
    if (!socket_.Send({"1.0",
                       id,
                       allowed ? "200" : "400",
                       allowed ? "OK" : "key not allowed",
                       allowed ? KeyToText(key) : "",
                       {}})) {
      LOG_EVERY_T(WARNING, 1) << "a ZAP request could not be answered";
    }
  }
  return refused;
}

}  // namespace kvrelay::transport
