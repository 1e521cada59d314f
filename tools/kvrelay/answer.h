// What comes back for one prompt, from a daemon or from this process.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "proto/messages.h"
#include "tools/common/keys.h"
#include "tools/common/stop_signals.h"

namespace kvrelay::tools {

struct Answer {
  std::vector<uint32_t> token_ids;  // generated ones only
  std::string text;                 // empty when the model has no text codec
  std::string summary_json;         // everything else: timing_ms, kv, finish_reason, ...
};

// New ids and their text, as they come; on the calling thread (remote) or on the engine's (local).
using OnTokens = std::function<void(const std::vector<uint32_t>& token_ids, std::string_view text)>;

// From the daemon at `endpoint` (tcp://HOST:PORT[#KEY]). kCancelled, and the daemon was told, when
// `signals` came first.
Result<Answer> GenerateRemotely(const std::string& endpoint, const KeyFlags& keys,
                                const proto::Generate& request, const StopSignals& signals,
                                const OnTokens& on_tokens);

// {"schema":1,"token_ids":[...],"text":"...","timing_ms":{...},"kv":{...},...}
std::string AnswerJson(const Answer& answer);

}  // namespace kvrelay::tools
