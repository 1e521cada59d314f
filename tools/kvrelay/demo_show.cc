#include "tools/kvrelay/demo_show.h"

#include <algorithm>

#include "tools/common/flag_text.h"
#include "tools/common/panels.h"
#include "tools/common/table.h"
#include "tools/common/units.h"

namespace kvrelay::tools {
namespace {

using Json = nlohmann::ordered_json;

Json Summary(const Answer& answer) {
  Json summary = Json::parse(answer.summary_json, nullptr, false);
  return summary.is_object() ? summary : Json::object();
}

std::string Indented(const std::string& text) {
  std::string out;
  for (const std::string& line : Wrap(text, 92)) out += line.empty() ? "\n" : "    " + line + "\n";
  return out;
}

uint64_t TokensOf(const std::vector<DemoRequest>& requests) {
  uint64_t tokens = 0;
  for (const DemoRequest& r : requests) tokens += r.identical() ? r.answer.token_ids.size() : 0;
  return tokens;
}

}  // namespace

std::string DemoBanner(const DemoDaemons& daemons, const std::string& model, const Paint& paint) {
  Table table({"", "", "", "", ""});
  for (const DemoDaemon* d : {&daemons.prefill(), &daemons.decode()}) {
    table.Row({d->name, d->endpoint, "pid " + std::to_string(d->pid), "TP " + std::to_string(d->tp),
               d->name == "prefill" ? "computes the KV cache of prompts"
                                    : "pulls it and generates the text"});
  }
  // The table's own header is empty.
  const std::string rows = table.Text("  ");
  return paint.Bold("kvrelay demo: one model, two processes, one KV cache") + "\n\n" +
         rows.substr(rows.find('\n') + 1) + "  model    " + model + "\n\n" +
         paint.Dim("  prompt ──► decode ──► prefill ══ KV cache ══► decode ──► text") + "\n\n";
}

std::string DemoPrompts(const std::vector<DemoRequest>& requests, const Paint& paint) {
  if (requests.empty()) return "";
  return paint.Bold("System prompt, shared by all requests") + "\n" +
         paint.Dim(Indented(std::string(Trim(requests.front().request.system_text)))) + "\n";
}

std::string DemoTable(const std::vector<DemoRequest>& requests, const Paint& paint) {
  Table table({"request", ">prompt", "path", ">pulled", "system prompt", ">prefill", ">handshake",
               ">pull", ">first token", ">total"});
  for (size_t i = 0; i < requests.size(); ++i) {
    const Json summary = Summary(requests[i].answer);
    const Json kv = summary.value("kv", Json::object());
    const Json timing = summary.value("timing_ms", Json::object());
    const auto ms = [&timing](const char* stage) { return FormatMillis(timing.value(stage, 0.0)); };
    const uint64_t prefix_bytes = kv.value("prefix_bytes_pulled", uint64_t{0});
    table.Row({"[" + std::to_string(i + 1) + "]",
               FormatCount(kv.value("prompt_tokens", uint64_t{0})) + " tokens",
               kv.value("path", "?"), FormatBytes(kv.value("bytes_pulled", uint64_t{0})),
               prefix_bytes > 0                ? "pulled, " + FormatBytes(prefix_bytes)
               : kv.value("prefix_hit", false) ? "was here"
                                               : "none",
               ms("prefill"), ms("handshake"), ms("pull"), ms("ttft"), ms("total")});
  }
  return paint.Bold("What moved") + "\n" + table.Text("  ") + "\n";
}

bool AllIdentical(const std::vector<DemoRequest>& requests) {
  return std::all_of(requests.begin(), requests.end(),
                     [](const DemoRequest& r) { return r.identical(); });
}

std::string DemoVerdict(const std::vector<DemoRequest>& requests, const Paint& paint) {
  const auto same = std::count_if(requests.begin(), requests.end(),
                                  [](const DemoRequest& r) { return r.identical(); });
  const bool all = AllIdentical(requests);
  const std::string count = std::to_string(same) + " of " + std::to_string(requests.size()) +
                            " requests, " + FormatCount(TokensOf(requests)) + " tokens";
  std::string text =
      all ? paint.Good("identical: " + count) : paint.Bad("different: identical are " + count);
  text += paint.Dim("  (token ids of two processes against those of one)") + "\n";
  for (size_t i = 0; i < requests.size(); ++i) {
    const auto& ids = requests[i].answer.token_ids;
    const auto& local = requests[i].local.token_ids;
    if (requests[i].identical()) continue;
    const auto [a, b] = std::mismatch(ids.begin(), ids.end(), local.begin(), local.end());
    text += "  [" + std::to_string(i + 1) + "] differs at token " +
            std::to_string(a - ids.begin()) + ": " +
            (a == ids.end() ? "the end" : std::to_string(*a)) + ", in one process " +
            (b == local.end() ? "the end" : std::to_string(*b)) + "\n";
  }
  return text;
}

std::string DemoJson(const DemoDaemons& daemons, const std::string& model,
                     const std::vector<DemoRequest>& requests) {
  Json list = Json::array();
  for (const DemoRequest& r : requests) {
    Json one = Json::parse(AnswerJson(r.answer), nullptr, false);
    one.erase("schema");
    one["prompt"] = r.request.prompt_text;
    one["local_token_ids"] = r.local.token_ids;
    one["identical"] = r.identical();
    list.push_back(std::move(one));
  }
  const Json json = {{"schema", 1},
                     {"identical", AllIdentical(requests)},
                     {"identical_tokens", TokensOf(requests)},
                     {"model", model},
                     {"prefill", daemons.prefill().ready},
                     {"decode", daemons.decode().ready},
                     {"requests", std::move(list)}};
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace kvrelay::tools
