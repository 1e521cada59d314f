// The processes that tests start beside their own.
#include <poll.h>
#include <unistd.h>

#include <iostream>
#include <map>
#include <sstream>
#include <string>

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
//   counters                        answers "counters name=value ..."
int OwnerMain(const std::vector<std::string>& arguments) {
  Node node(arguments.at(0), arguments.at(1), std::stoull(arguments.at(2)), [&](Options& options) {
    if (arguments.size() > 4) options.data_interface = arguments[4];
  });
  node.Fill(std::stoull(arguments.at(3)));
  std::cout << "ready " << ToText(node.Spec("owner")) << std::endl;
  while (true) {
    node.control().RunUntil(StdinReady, std::chrono::hours(1));
    std::string line;
    if (!std::getline(std::cin, line)) return 0;
    std::istringstream in(line);
    std::string verb;
    in >> verb;
    if (verb == "start" || verb == "end") {
      uint32_t slot = 0;
      in >> slot;
      if (verb == "start") {
        node.StartLease(slot);
      } else {
        node.record(slot)->End();
      }
      std::cout << "ok" << std::endl;
    } else if (verb == "send") {
      std::string reader;
      uint64_t stream = 0;
      uint32_t chunks = 0;
      uint64_t chunk_bytes = 0;
      uint32_t slot = 0;
      int64_t timeout_ms = 0;
      in >> reader >> stream >> chunks >> chunk_bytes >> slot >> timeout_ms;
      node.transport().StartPackedSend(
          FromText(reader), stream, SendPlan(chunks, chunk_bytes), node.record(slot),
          Lease(node.Spec(""), slot), In(Millis(timeout_ms)), [](const Completion& completion) {
            std::cout << "sent " << CodeName(completion.status.code()) << std::endl;
          });
    } else if (verb == "counters") {
      std::cout << "counters";
      for (const auto& [name, value] : node.transport().counters()) {
        std::cout << ' ' << name << '=' << value;
      }
      std::cout << std::endl;
    }
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

}  // namespace
}  // namespace kvrelay::transport
