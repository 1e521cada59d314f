#include "tools/kvrelay/bench/owner.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tools/kvrelay/bench/bare_get.h"
#include "tools/kvrelay/bench/bare_stream.h"
#include "tools/kvrelay/bench/pull_case.h"
#include "tools/kvrelay/bench/side.h"

namespace kvrelay::tools {

Status RunOwner(Channel& reader, UniqueFd socket, const std::string& run_dir,
                uint64_t memory_bytes) {
  KVRELAY_ASSIGN_OR_RETURN(const auto side, Side::Create(run_dir, memory_bytes));
  FillPattern(side->memory());
  side->StartLease();
  std::vector<transport::PeerSpec> readers;
  for (const Side::Way& way : side->ways()) {
    KVRELAY_RETURN_IF_ERROR(reader.SendSpec(side->Spec(way.transport.get())));
    KVRELAY_RETURN_IF_ERROR(reader.ReceiveSpec(readers.emplace_back()));
  }
  const auto bare = BareGetOwner::Start(side->memory());
  KVRELAY_RETURN_IF_ERROR(reader.SendText(bare.has_value() ? (*bare)->Invitation() : ""));
  std::string receiver;
  KVRELAY_RETURN_IF_ERROR(reader.ReceiveText(receiver));
  std::unique_ptr<BareSender> sender;
  if (!receiver.empty()) {
    KVRELAY_ASSIGN_OR_RETURN(sender, BareSender::Connect(receiver, kBenchChunkBytes));
  }
  KVRELAY_RETURN_IF_ERROR(reader.Send(side->kv().export_fd()));
  KVRELAY_RETURN_IF_ERROR(reader.Send(side->kv().data()));

  constexpr char kReady = 'r';
  Channel plain(std::move(socket));
  OwnerRequest prepared;
  std::optional<transport::StreamPlan> stream;
  while (true) {
    OwnerRequest request;
    KVRELAY_RETURN_IF_ERROR(reader.Receive(request));
    switch (request.kind) {
      case OwnerRequest::Kind::kPrepare:
        prepared = request;
        stream = PullCase::Make(memory_bytes, request.slice_bytes, request.set, request.count)
                     .Stream(kBenchChunkBytes, /*pack=*/true);
        KVRELAY_RETURN_IF_ERROR(reader.Send(kReady));
        break;
      case OwnerRequest::Kind::kStream: {
        std::optional<Status> sent;
        side->ways()[prepared.way].transport->StartPackedSend(
            readers[prepared.way], prepared.stream, *stream, side->record(),
            Side::LeaseOf(side->incarnation()),
            std::chrono::steady_clock::now() + std::chrono::seconds(50),
            [&](const transport::Completion& done) { sent = done.status; });
        KVRELAY_RETURN_IF_ERROR(reader.Send(kReady));
        KVRELAY_RETURN_IF_ERROR(side->RunUntil([&] { return sent.has_value(); }));
        KVRELAY_RETURN_IF_ERROR(*sent);
        break;
      }
      case OwnerRequest::Kind::kSocket:
        KVRELAY_RETURN_IF_ERROR(reader.Send(kReady));
        for (uint64_t at = 0; at < request.bytes;) {
          const uint64_t part = std::min(request.bytes - at, kBenchChunkBytes);
          KVRELAY_RETURN_IF_ERROR(plain.Write(side->kv().data() + at, part));
          at += part;
        }
        break;
      case OwnerRequest::Kind::kBareStream: {
        KVRELAY_RETURN_IF_ERROR(reader.Send(kReady));
        KVRELAY_RETURN_IF_ERROR(sender->Send(request.bytes));
        // What the socket did not take yet needs progress.
        while (!reader.Readable()) sender->Progress();
        char came = 0;
        KVRELAY_RETURN_IF_ERROR(reader.Receive(came));
        break;
      }
      case OwnerRequest::Kind::kQuit:
        return {};
    }
  }
}

}  // namespace kvrelay::tools
