#include "tools/common/describe_text.h"

#include <cmath>

#include "tools/common/flag_text.h"
#include "tools/common/table.h"
#include "tools/common/units.h"

namespace kvrelay::tools {
namespace {

constexpr size_t kShortId = 12;

std::string ShortId(const std::string& id) { return id.substr(0, kShortId); }

// "0-5 of 6", "3 of 6" or "none of 6" for the half-open range [begin, end).
std::string RangeText(uint32_t begin, uint32_t end, uint32_t total) {
  std::string range = "none";
  if (end > begin) range = std::to_string(begin);
  if (end > begin + 1) range += "-" + std::to_string(end - 1);
  return range + " of " + std::to_string(total);
}

std::string CounterValue(double value) {
  if (value >= 0 && value < 1e15 && value == std::floor(value)) {
    return FormatCount(static_cast<uint64_t>(value));
  }
  return std::to_string(value);
}

std::string TimeLeft(int64_t ms) {
  return ms <= 0 ? "over" : FormatMillis(static_cast<double>(ms));
}

class Page {
 public:
  explicit Page(bool bold) : bold_(bold) {}

  void Head(const std::string& title, const std::string& rest = "") {
    if (!text_.empty()) text_ += "\n";
    text_ += bold_ ? "\033[1m" + title + "\033[0m" : title;
    text_ += rest.empty() ? "\n" : "  " + rest + "\n";
  }
  void Line(const std::string& line) { text_ += "  " + line + "\n"; }
  void List(const std::string& title, const Table& table) {
    if (table.empty()) return;
    Head(title);
    text_ += table.Text("  ");
  }
  std::string Take() { return std::move(text_); }

 private:
  bool bold_;
  std::string text_;
};

void AddEngine(Page& page, const Description& d) {
  const Description::Engine& e = d.engine;
  const std::string state = e.draining ? "draining" : e.ready ? "ready" : "not ready";
  page.Head(e.role + " engine " + ShortId(e.engine_id),
            e.endpoint + "  " + state + ", up " + FormatMillis(static_cast<double>(e.uptime_ms)));
  page.Line("version " + e.version + ", protocol " + std::to_string(e.protocol) + ", pid " +
            std::to_string(e.pid) + ", TP " + std::to_string(e.tp) + ", PP " +
            std::to_string(e.pp) + ", incarnation " + e.incarnation);
  page.Line("model " + e.model_name + ", fingerprint " + e.model_fingerprint);
}

void AddCache(Page& page, const Description& d) {
  const Description::Layout& l = d.layout;
  page.Head("cache", l.dtype + " " + l.format + ", " + std::to_string(l.layers) + " layers x " +
                         std::to_string(l.kv_heads) + " KV heads x " + std::to_string(l.head_dim) +
                         " on rank 0, blocks of " + std::to_string(l.block_size) + " tokens");
  page.Line("strides: block " + FormatBytes(l.block_stride_bytes) + ", head " +
            FormatBytes(l.head_stride_bytes) + ", token " + FormatBytes(l.token_stride_bytes));
  const Description::Blocks& b = d.blocks;
  const std::string kept = b.kept == 0 ? "" : " (" + FormatCount(b.kept) + " of conversations)";
  page.Line("blocks: " + FormatCount(b.used) + " used" + kept + ", " + FormatCount(b.free) +
            " free, " + FormatCount(b.quarantine) + " in quarantine, " + FormatCount(b.total) +
            " in all");

  page.Line("transports: " + Join(d.transports, "; "));

  Table shards({"rank", "layers", "KV heads"});
  for (const auto& s : d.shards) {
    shards.Row({std::to_string(s.rank) + " of " + std::to_string(d.engine.tp * d.engine.pp),
                RangeText(s.layer_begin, s.layer_end, s.total_layers),
                RangeText(s.head_begin, s.head_end, s.total_heads)});
  }
  page.List("shards", shards);

  Table regions({">rank", ">region", "device", ">bytes", "exported"});
  for (const auto& r : d.regions) {
    regions.Row({std::to_string(r.rank), std::to_string(r.id), r.device, FormatBytes(r.bytes),
                 r.exported.empty() ? "no" : r.exported});
  }
  page.List("regions", regions);
}

void AddLeases(Page& page, const Description& d) {
  Table leases({"id", "kind", "state", ">tokens", ">blocks", ">readers", ">time left", "epoch"});
  for (const auto& l : d.leases) {
    leases.Row({ShortId(l.id), l.kind, l.state, FormatCount(l.tokens), FormatCount(l.blocks),
                FormatCount(l.readers), TimeLeft(l.time_left_ms), l.epoch});
  }
  page.List("leases", leases);

  Table sessions({">pull", ">rank", "state", ">tokens", ">blocks", "from"});
  for (const auto& s : d.sessions) {
    sessions.Row({std::to_string(s.number), std::to_string(s.rank), s.state, FormatCount(s.tokens),
                  FormatCount(s.blocks), s.peer});
  }
  page.List("sessions", sessions);

  Table prefixes({"hash", ">tokens", ">bytes", ">references", ">hits"});
  for (const auto& p : d.prefixes) {
    prefixes.Row({ShortId(p.hash), FormatCount(p.tokens), FormatBytes(p.bytes),
                  FormatCount(p.references), FormatCount(p.hits)});
  }
  page.List("prefixes", prefixes);
}

void AddPeers(Page& page, const Description& d) {
  Table peers({">own rank", "engine", ">rank", "endpoint", "state", "path", ">RTT", "why"});
  for (const auto& p : d.peers) {
    peers.Row({std::to_string(p.own_rank), ShortId(p.engine_id), std::to_string(p.rank), p.endpoint,
               p.state, p.path, p.rtt_ms > 0 ? FormatMillis(p.rtt_ms) : "-", p.why});
  }
  page.List("peers", peers);

  Table workers({"endpoint", "state", ">outstanding tokens", ">failures", "why"});
  for (const auto& w : d.prefill_workers) {
    workers.Row(
        {w.endpoint, w.state, FormatCount(w.outstanding_tokens), FormatCount(w.failures), w.why});
  }
  page.List("prefill workers", workers);
}

void AddNumbersAndFlags(Page& page, const Description& d) {
  Table counters({"counter", ">value"});
  for (const auto& [name, value] : d.counters) counters.Row({name, CounterValue(value)});
  page.List("counters", counters);

  Table flags({"flag", "value", "from"});
  for (const auto& f : d.flags) flags.Row({"--" + f.name, f.value, f.source});
  page.List("flags", flags);
}

}  // namespace

std::string DescriptionText(const Description& description, bool bold) {
  Page page(bold);
  AddEngine(page, description);
  AddCache(page, description);
  AddLeases(page, description);
  AddPeers(page, description);
  AddNumbersAndFlags(page, description);
  return page.Take();
}

}  // namespace kvrelay::tools
