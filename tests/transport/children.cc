// The processes that tests start beside their own.
#include <poll.h>
#include <unistd.h>

#include <iostream>
#include <sstream>
#include <string>

#include "tests/common/isolated_host.h"
#include "tests/transport/child.h"
#include "tests/transport/node.h"

namespace kvrelay::transport {
namespace {

bool StdinReady() {
  pollfd ready{STDIN_FILENO, POLLIN, 0};
  return std::cin.rdbuf()->in_avail() > 0 || poll(&ready, 1, 0) > 0;
}

// owner PATH RUN_DIR KV_BYTES SEED [INTERFACE]: says "ready SPEC", then obeys its stdin:
//   start SLOT | end SLOT           a lease on a record; answers "ok"
//   send SPEC STREAM CHUNKS CHUNK_BYTES SLOT TIMEOUT_MS   answers "sent CODE" when it completed
//   connect SPEC                    answers "connected CODE MESSAGE"
//   receive STREAM CHUNKS CHUNK_BYTES SEED SLOT   from where it is connected to; answers
//   "receiving", and
//                                   "received CODE right|wrong MILLISECONDS" when it completed
struct NodeChild {
  Node node;
  PeerSpec peer_spec = {};
  PeerHandle peer = 0;

  void Obey(std::istringstream& in) {
    std::string verb;
    std::string spec;
    uint64_t stream = 0;
    uint32_t chunks = 0;
    uint64_t chunk_bytes = 0;
    uint64_t seed = 0;
    uint32_t slot = 0;
    int64_t timeout_ms = 0;
    in >> verb;
    if (verb == "start") {
      in >> slot;
      node.StartLease(slot);
      std::cout << "ok" << std::endl;
    } else if (verb == "end") {
      in >> slot;
      node.record(slot)->End();
      std::cout << "ok" << std::endl;
    } else if (verb == "send") {
      in >> spec >> stream >> chunks >> chunk_bytes >> slot >> timeout_ms;
      node.transport().StartPackedSend(
          FromText(spec), stream, SendPlan(chunks, chunk_bytes), node.record(slot),
          Lease(node.Spec(""), slot), In(Millis(timeout_ms)), [](const Completion& completion) {
            std::cout << "sent " << CodeName(completion.status.code()) << std::endl;
          });
    } else if (verb == "connect") {
      in >> spec;
      peer_spec = FromText(spec);
      const auto connected = node.Connect(
          peer_spec, [] {}, std::chrono::seconds(2));
      if (connected.has_value()) peer = *connected;
      const Status status = connected.has_value() ? Status() : connected.error();
      std::cout << "connected " << CodeName(status.code()) << ' ' << status.message() << std::endl;
    } else if (verb == "receive") {
      in >> stream >> chunks >> chunk_bytes >> seed >> slot;
      const TimePoint begin = In({});
      node.transport().StartPackedReceive(
          peer, stream, ReceivePlan(chunks, chunk_bytes), Lease(peer_spec, slot),
          In(std::chrono::seconds(20)), [=, this](const Completion& completion) {
            const double ms = ToMillis(In({}) - begin);
            const bool right = !node.FirstWrong(seed, chunks * chunk_bytes).has_value();
            std::cout << "received " << CodeName(completion.status.code())
                      << (right ? " right " : " wrong ") << ms << std::endl;
          });
      std::cout << "receiving" << std::endl;
    }
  }
};

int OwnerMain(const std::vector<std::string>& arguments) {
  NodeChild child{
      Node(arguments.at(0), arguments.at(1), std::stoull(arguments.at(2)), [&](Options& options) {
        if (arguments.size() > 4) options.data_interface = arguments[4];
      })};
  child.node.Fill(std::stoull(arguments.at(3)));
  std::cout << "ready " << ToText(child.node.Spec("owner")) << std::endl;
  while (true) {
    child.node.control().RunUntil(StdinReady, std::chrono::hours(1));
    std::string line;
    if (!std::getline(std::cin, line)) return 0;
    std::istringstream in(line);
    child.Obey(in);
  }
}
const RegisterChild kOwner("owner", OwnerMain);

// reader PATH RUN_DIR SPEC: connects, says "connected CODE", and stays until its stdin ends.
int ReaderMain(const std::vector<std::string>& arguments) {
  Node node(arguments.at(0), arguments.at(1), 1 << 20);
  const auto peer = node.Connect(FromText(arguments.at(2)));
  std::cout << "connected " << CodeName(peer.has_value() ? Code::kOk : peer.error().code())
            << std::endl;
  node.control().RunUntil(StdinReady, std::chrono::hours(1));
  return 0;
}
const RegisterChild kReader("reader", ReaderMain);

// there PID NAME ARGUMENTS...: goes on as NAME in the namespaces of that process.
int ThereMain(const std::vector<std::string>& arguments) {
  if (!IsolatedHost::Enter(std::stoi(arguments.at(0)))) return 1;
  return RunRegisteredChild(arguments.at(1), {arguments.begin() + 2, arguments.end()});
}
const RegisterChild kThere("there", ThereMain);

}  // namespace
}  // namespace kvrelay::transport
