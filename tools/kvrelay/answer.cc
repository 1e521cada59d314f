#include "tools/kvrelay/answer.h"

#include <nlohmann/json.hpp>

#include "proto/codec.h"
#include "tools/kvrelay/ask.h"

namespace kvrelay::tools {
namespace {

// The daemon knows the deadline too and its message says more than ours: let it be first.
constexpr Duration kGrace = std::chrono::milliseconds(500);

void Append(Answer& answer, proto::GenerateReply reply, const OnTokens& on_tokens) {
  answer.token_ids.insert(answer.token_ids.end(), reply.token_ids.begin(), reply.token_ids.end());
  answer.text += reply.text;
  if (!reply.token_ids.empty() || !reply.text.empty()) on_tokens(reply.token_ids, reply.text);
  answer.summary_json = std::move(reply.summary_json);
}

}  // namespace

Result<Answer> GenerateRemotely(const std::string& endpoint, const KeyFlags& keys,
                                const proto::Generate& request, const StopSignals& signals,
                                const OnTokens& on_tokens) {
  KVRELAY_ASSIGN_OR_RETURN(Asker asker, Asker::Open(endpoint, keys));
  const WhenStopped interrupt(signals, [&asker] { asker.client().Interrupt(); });
  Answer answer;
  const auto on_more = [&](std::string_view body) -> Status {
    KVRELAY_ASSIGN_OR_RETURN(proto::GenerateReply reply, proto::Decode<proto::GenerateReply>(body));
    Append(answer, std::move(reply), on_tokens);
    return Status::Ok();
  };
  KVRELAY_ASSIGN_OR_RETURN(const std::string last,
                           asker.client().Stream(proto::Type::kGenerate, proto::Encode(request),
                                                 Millis(request.timeout_ms) + kGrace, on_more));
  KVRELAY_ASSIGN_OR_RETURN(proto::GenerateReply reply, proto::Decode<proto::GenerateReply>(last));
  Append(answer, std::move(reply), on_tokens);
  return answer;
}

std::string AnswerJson(const Answer& answer) {
  using Json = nlohmann::ordered_json;
  Json json = {{"schema", 1}, {"token_ids", answer.token_ids}, {"text", answer.text}};
  const Json summary = Json::parse(answer.summary_json, nullptr, false);
  if (summary.is_object()) json.update(summary);
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace kvrelay::tools
