#include "tools/kvrelayd/options.h"

#include <unistd.h>

#include "base/random.h"
#include "proto/limits.h"
#include "tools/common/logging.h"
#include "transport/mapped_address.h"
#include "transport/transport.h"

namespace kvrelay::tools {
namespace {

constexpr size_t kIdDigits = 32;

Result<EngineId> ParseEngineId(const std::string& text) {
  EngineId id;
  if (text.empty()) return RandomId<EngineId>();
  const bool is_hex = text.find_first_not_of("0123456789abcdef") == std::string::npos;
  if (text.size() != kIdDigits || !is_hex) {
    return Error(Code::kInvalidArgument,
                 "--engine_id=" + text + " needs 32 hexadecimal digits, lower case");
  }
  for (size_t i = 0; i < id.bytes.size(); ++i) {
    id.bytes[i] = static_cast<uint8_t>(std::stoul(text.substr(2 * i, 2), nullptr, 16));
  }
  return id;
}

}  // namespace

std::string DefaultRunDir(const Environment& environment) {
  if (const auto runtime = environment("XDG_RUNTIME_DIR"); runtime && !runtime->empty()) {
    return *runtime + "/kvrelay";
  }
  return "/tmp/kvrelay-" + std::to_string(::geteuid());
}

void DaemonOptions::Declare(FlagSet& flags) {
  run_dir = DefaultRunDir(ProcessEnvironment());
  flags.Section("Role and addresses");
  flags.Choice("role", &role, {"prefill", "decode"},
               "computes prompts, or pulls their KV and generates");
  flags.Text("listen", &listen, "tcp://HOST:PORT", "front endpoint; port 0 takes any");
  flags.Text("advertise", &advertise, "tcp://HOST:PORT",
             "front endpoint as others reach it; needed when --listen is a wildcard");
  flags.Text("prefill", &prefill, "ENDPOINT,...",
             "prefill daemons of a decode daemon, tcp://HOST:PORT[#KEY]");
  flags.Whole("rank_ports", &rank_ports, 0, 65535,
              "port of rank 1, the next ranks follow (rank 0 has --listen); 0 takes any");
  keys.Declare(flags);
  flags.Switch("insecure", &insecure, "listens off loopback without keys");
  flags.Text("engine_id", &engine_id, "HEX",
             "32 hexadecimal digits that survive restarts; random when empty");
  AddEngineFlags(flags, &engine);
  flags.Section("Moving the cache");
  std::vector<std::string> transports = {"auto"};
  for (const auto& kind : transport::TransportKinds()) transports.emplace_back(kind.name);
  flags.Choice(
      "transport", &transport, transports,
      "how the cache is pulled; auto takes the first that works, per peer, and zmq-packed, which "
      "encrypts, only with keys");
  flags.Whole("lease_ttl_ms", &lease_ttl_ms, 100, proto::kMaxDurationMs,
              "how long an offered cache waits for its reader, in milliseconds");
  flags.Whole("pull_timeout_ms", &pull_timeout_ms, 1, proto::kMaxDurationMs,
              "deadline of one pull, in milliseconds");
  flags.Switch("stream_pulls", &stream_pulls,
               "decode: pulls the cache while the prompt is computed, not after it");
  flags.Switch(
      "reuse_from_decode", &reuse_from_decode,
      "of a conversation's next turn only the new tokens are computed. decode: keeps what it "
      "answered and offers it; prefill: dials the decode daemon that a request names and "
      "takes it, if its --kv_dtype is the same");
  flags.Whole("conversation_blocks", &conversation_blocks, 1, 1U << 24,
              "decode with --reuse_from_decode: cache blocks kept of answered conversations, least "
              "recently used out first, all of them when requests need the room");
  flags.Whole("conversation_ttl_ms", &conversation_ttl_ms, 1, proto::kMaxDurationMs,
              "how long a conversation is kept after its last turn, in milliseconds");
  flags.Text("host_id", &host_id, "NAME",
             "name of this host: daemons share memory only where it is equal; the kernel's boot id "
             "when empty");
  flags.Text("data_interface", &data_interface, "NAME",
             "network interface of UCX and of zmq-packed; loopback when empty");
  flags.Switch("trusted_data_network", &trusted_data_network,
               "lets UCX, whose ports are not authenticated, listen off loopback; without it, and "
               "with keys, zmq-packed takes its place there");
  flags.Text("run_dir", &run_dir, "DIR",
             "folder (mode 0700) of the sockets by which daemons of one host share memory");
  flags.Whole(
      "max_bytes_per_s", &max_bytes_per_s, 0, UINT64_MAX,
      "caches' bytes that this daemon moves in a second, over all ranks: those it reads from "
      "memory that it sees, and those it sends; 0: as fast as it goes");
  flags.Whole(
      "max_inflight_bytes", &max_inflight_bytes, 0, UINT64_MAX,
      "of those, bytes on their way at one time, a larger message alone; and the same of the "
      "streams that it has asked others for; 0: as many as it likes");
  flags.Whole("max_mapped_bytes", &max_mapped_bytes, 0, UINT64_MAX,
              "of other daemons' caches on this host that each rank keeps mapped, those read the "
              "longest time ago out first; 0: all");
  flags.Whole("spin_us", &spin_us, 0, 1'000'000, "microseconds a thread spins before it sleeps");
  flags.Section("Process");
  flags.Whole("drain_timeout_ms", &drain_timeout_ms, 0, proto::kMaxDurationMs,
              "how long the first SIGTERM or SIGINT lets open work go on, in milliseconds");
  AddLogFlag(flags, &log_level);
}

bool DaemonOptions::DataNetworkIsTrusted() const {
  return trusted_data_network || data_interface.empty() || data_interface == "lo";
}

Status DaemonOptions::CheckUntrustedDataNetwork() const {
  const std::string interface = "--data_interface=" + data_interface;
  if (identity == nullptr) {
    return Error(Code::kInvalidArgument,
                 interface +
                     " opens ports to that network that anybody who reaches them can use; "
                     "--key_file=FILE ends that, --trusted_data_network allows it");
  }
  for (const auto& kind : transport::TransportKinds()) {
    if (kind.name != transport || !kind.open_ports) continue;
    return Error(Code::kInvalidArgument,
                 interface + " with --transport=" + transport +
                     " opens UCX's unauthenticated ports to that network; "
                     "--trusted_data_network allows that, --transport=zmq-packed does without");
  }
  return Status::Ok();
}

Status DaemonOptions::Check() {
  if (role.empty())
    return Error(Code::kInvalidArgument, "--role=prefill or --role=decode is needed");
  if (engine.options.model_dir.empty())
    return Error(Code::kInvalidArgument, "--model=DIR is needed");
  KVRELAY_RETURN_IF_ERROR(engine.options.Validate());

  const Result<Endpoint> at = ParseEndpoint(listen, AnyPort::kAllowed);
  if (!at) return at.error().Wrap("--listen");
  listen_at = advertise_at = *at;
  if (at->key) return Error(Code::kInvalidArgument, "--listen takes no #KEY: --key_file has it");
  if (!advertise.empty()) {
    const Result<Endpoint> reached_at = ParseEndpoint(advertise, AnyPort::kAllowed);
    if (!reached_at) return reached_at.error().Wrap("--advertise");
    if (reached_at->IsWildcard()) {
      return Error(Code::kInvalidArgument,
                   "--advertise=" + advertise + " is a wildcard: nobody can connect to that");
    }
    if (reached_at->key) {
      return Error(Code::kInvalidArgument, "--advertise takes no #KEY: --key_file has it");
    }
    advertise_at = *reached_at;
  } else if (listen_at.IsWildcard()) {
    return Error(Code::kInvalidArgument,
                 "--listen=" + listen +
                     " is a wildcard: --advertise=tcp://HOST:PORT must say how others reach it");
  }
  const Result<std::vector<Endpoint>> workers = ParseEndpoints(prefill);
  if (!workers) return workers.error().Wrap("--prefill");
  prefill_workers = *workers;
  if (role == "decode" && prefill_workers.empty()) {
    return Error(Code::kInvalidArgument, "--role=decode needs --prefill=ENDPOINT,...");
  }
  if (role == "prefill" && !prefill_workers.empty()) {
    return Error(Code::kInvalidArgument, "--prefill goes with --role=decode");
  }
  const Result<std::shared_ptr<const transport::CurveIdentity>> own = keys.Load(prefill_workers);
  if (!own) return own.error();
  identity = *own;
  if (!listen_at.IsLoopback() && identity == nullptr && !insecure) {
    return Error(Code::kInvalidArgument,
                 "--listen=" + listen +
                     " is not loopback and there are no keys: anybody who reaches it can "
                     "use it; --key_file=FILE ends that, --insecure allows it");
  }
  if (!DataNetworkIsTrusted()) KVRELAY_RETURN_IF_ERROR(CheckUntrustedDataNetwork());

  const engine::EngineOptions& ranks = engine.options;
  if (rank_ports != 0 && rank_ports + uint64_t{ranks.tp} * ranks.pp - 2 > 65535) {
    return Error(Code::kInvalidArgument, "--rank_ports=" + std::to_string(rank_ports) +
                                             ", --tp=" + std::to_string(ranks.tp) + " and --pp=" +
                                             std::to_string(ranks.pp) + " go beyond port 65535");
  }
  if (const auto host = transport::ThisHost(host_id); !host) return host.error();
  if (run_dir.empty()) return Error(Code::kInvalidArgument, "--run_dir is empty");
  KVRELAY_ASSIGN_OR_RETURN(id, ParseEngineId(engine_id));
  return Status::Ok();
}

}  // namespace kvrelay::tools
