#include "agent/client.h"

#include <optional>
#include <utility>

#include "agent/counters.h"
#include "agent/event_loop.h"
#include "agent/zmq_rpc.h"
#include "base/wake_queue.h"

namespace kvrelay::agent {

struct Client::State {
  std::string endpoint;
  UniqueFd interrupt = internal::MakeEventFd();
  Counters counters;
  EventLoop loop;
  std::unique_ptr<ZmqRpc> rpc;
};

Result<Client> Client::Connect(const std::string& endpoint,
                               std::shared_ptr<const transport::CurveIdentity> curve) {
  constexpr std::string_view kScheme = "tcp://";
  const size_t colon = endpoint.rfind(':');
  if (!endpoint.starts_with(kScheme) || colon <= kScheme.size() || colon + 1 == endpoint.size()) {
    return Error(Code::kInvalidArgument, "'" + endpoint + "' is not an endpoint: tcp://HOST:PORT");
  }
  if (const auto at = transport::KeyedEndpoint::FromText(endpoint); !at) return Error(at.error());
  auto state = std::make_unique<State>();
  state->endpoint = endpoint;
  KVRELAY_ASSIGN_OR_RETURN(state->rpc,
                           ZmqRpc::Create(state->loop, state->counters,
                                          {.listen = {}, .curve = std::move(curve), .socket = {}}));
  return Client(std::move(state));
}

Client::Client(std::unique_ptr<State> state) : state_(std::move(state)) {}
Client::Client(Client&&) noexcept = default;
Client& Client::operator=(Client&&) noexcept = default;
Client::~Client() = default;

Result<std::string> Client::Call(proto::Type type, std::string body, Duration timeout) {
  return Stream(type, std::move(body), timeout, [](std::string_view) { return Status::Ok(); });
}

Result<std::string> Client::Stream(proto::Type type, std::string body, Duration timeout,
                                   const std::function<Status(std::string_view)>& on_more) {
  EventLoop& loop = state_->loop;
  std::optional<Result<std::string>> result;
  Rpc::CallId call = 0;
  EventLoop::WatchId watch = 0;

  const auto finish = [&](Result<std::string> outcome) {
    if (result) return;
    result = std::move(outcome);
    loop.Unwatch(watch);  // in the loop: outside of it the next call may be another thread's
    loop.Stop();
  };
  const auto give_up = [&](Status status) {
    if (result) return;
    state_->rpc->Abandon(call);
    finish(Error(std::move(status)));
  };
  watch = loop.WatchFd(state_->interrupt.get(), [&] {
    internal::ClearEventFd(state_->interrupt.get());
    give_up({Code::kCancelled, "interrupted"});
  });
  call = state_->rpc->Call(state_->endpoint, type, std::move(body), loop.Now() + timeout,
                           [&](Result<std::string> reply, bool more) {
                             if (!more) return finish(std::move(reply));
                             if (Status status = on_more(*reply); !status.ok()) {
                               give_up(std::move(status));
                             }
                           });
  loop.Run();
  return *std::move(result);
}

void Client::Interrupt() { internal::SignalEventFd(state_->interrupt.get()); }

}  // namespace kvrelay::agent
