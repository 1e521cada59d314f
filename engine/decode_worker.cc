#include "engine/decode_worker.h"

#include <glog/logging.h>

#include <algorithm>
#include <utility>

#include "agent/decode_request.h"
#include "base/random.h"
#include "engine/fingerprint.h"
#include "proto/codec.h"

namespace kvrelay::engine {
namespace {

std::string MakeRequestId() { return RandomId<LeaseId>().ToHex().substr(0, 16); }

}  // namespace

std::vector<uint32_t> DecodeWorker::Active::Prompt() const {
  std::vector<uint32_t> prompt = system_ids;
  prompt.insert(prompt.end(), token_ids.begin(), token_ids.end());
  return prompt;
}

DecodeWorker::DecodeWorker(Engine& engine, agent::EngineAgent& agent)
    : engine_(engine), agent_(agent) {
  agent_.rpc().Handle(proto::Type::kGenerate,
                      [this](std::string_view body, const agent::ResponderPtr& responder) {
                        OnGenerate(body, responder);
                      });
  agent_.rpc().Handle(proto::Type::kCancel,
                      [this](std::string_view body, const agent::ResponderPtr& responder) {
                        OnCancelRequest(body, responder);
                      });
}

void DecodeWorker::Drain() {
  draining_ = true;
  agent_.SetDraining();
}

size_t DecodeWorker::EndAll() {
  const std::unordered_map<RequestNumber, ActivePtr> requests = requests_;
  for (const auto& [number, active] : requests) {
    End(active, {Code::kDraining, "the decode worker shut down before the answer was complete"});
  }
  return requests.size();
}

void DecodeWorker::OnGenerate(std::string_view body, const agent::ResponderPtr& responder) {
  auto generate = agent::DecodeRequest<proto::Generate>(agent_.env(), body);
  if (!generate.has_value()) return responder->Fail(generate.error());
  auto active = std::make_shared<Active>(engine_.tokenizer());
  active->responder = responder;
  active->request_id =
      generate->request_id.empty() ? MakeRequestId() : std::move(generate->request_id);
  if (Status status = Submit(active, std::move(*generate)); !status.ok()) {
    active->over = true;
    agent_.counters().Add("kvrelay_requests_total{role=\"decode\",outcome=\"" +
                          std::string(CodeName(status.code())) + "\"}");
    return responder->Fail(status);
  }
  requests_[active->number] = active;
  responder->OnCancel([this, active] { End(active, {Code::kCancelled, "the client left"}); });
}

Status DecodeWorker::Submit(const ActivePtr& active, proto::Generate generate) {
  if (draining_) return {Code::kDraining, "decode " + agent_.endpoint() + " is shutting down"};
  if (!generate.prompt_text.empty() || !generate.system_text.empty()) {
    auto ids = engine_.tokenizer().Encode(generate.system_text, generate.prompt_text);
    if (!ids.has_value()) return ids.error();
    generate.system_ids = std::move(ids->system_ids);
    generate.token_ids = std::move(ids->token_ids);
  }
  Request request;
  request.kind = RequestKind::kDecode;
  request.system_ids = generate.system_ids;
  request.token_ids = generate.token_ids;
  request.max_new_tokens = generate.max_new_tokens;
  request.sampling = {
      .temperature = generate.temperature, .top_p = generate.top_p, .seed = generate.seed};
  request.stop_ids = std::move(generate.stop_ids);
  request.ignore_eos = generate.ignore_eos;
  request.deadline = agent_.env().clock.Now() + Millis(generate.timeout_ms);
  active->system_ids = std::move(generate.system_ids);
  active->token_ids = std::move(generate.token_ids);
  active->priority = generate.priority;
  active->deadline = request.deadline;
  // From the engine's thread to ours, in order.
  request.on_admitted = [this, active](RequestNumber, Admission admission) {
    agent_.Post([this, active, held = std::make_shared<Admission>(std::move(admission))] {
      OnAdmitted(active, held);
    });
  };
  request.on_tokens = [this, active](RequestNumber, std::span<const uint32_t> ids) {
    agent_.Post([this, active, copy = std::vector<uint32_t>(ids.begin(), ids.end())] {
      OnTokens(active, copy);
    });
  };
  request.on_done = [this, active](RequestNumber, const Outcome& outcome) {
    agent_.Post([this, active, outcome] { OnDone(active, outcome); });
  };
  auto number = engine_.Submit(std::move(request));
  if (!number.has_value()) return number.error();
  active->number = *number;
  return Status::Ok();
}

void DecodeWorker::OnAdmitted(const ActivePtr& active,
                              const std::shared_ptr<Admission>& admission) {
  if (active->over) return;
  if (!admission->kept.conversation) return StartFetch(active, admission, {});
  agent_.counters().Add("kvrelay_conversation_hits_total");
  OfferKept(active, admission);
}

void DecodeWorker::StartFetch(const ActivePtr& active, const std::shared_ptr<Admission>& admission,
                              std::vector<proto::Reuse> reuse) {
  const std::vector<uint32_t> prompt = active->Prompt();
  const std::vector<ContentHash>& names = admission->prefix_names;
  // To the worker, all that is shared is a system prompt.
  const auto behind_system =
      prompt.begin() +
      static_cast<ptrdiff_t>(std::max<size_t>(active->system_ids.size(), admission->prefix_tokens));
  agent::FetchRequest request{
      .request_id = active->request_id,
      .system_ids = {prompt.begin(), behind_system},
      .token_ids = {behind_system, prompt.end()},
      .prompt_hash = PromptHash(engine_.fingerprint(), prompt),
      .prefix_hash = names.empty() ? ContentHash{} : names.back(),
      .prefix_tokens = admission->prefix_tokens,
      .prefix_names = names,
      .blocks =
          [admission, block_size = engine_.runner().block_size()] {
            const uint32_t held = (admission->held_tokens - admission->prefix_tokens) / block_size;
            return HeldTables(admission->blocks.Share(held, admission->blocks.size() - held),
                              admission->held_tokens);
          },
      .held_tokens = admission->held_tokens,
      .reuse = std::move(reuse),
      .priority = active->priority,
      .deadline = active->deadline};
  active->fetch = agent_.StartFetch(
      std::move(request),
      [this, active](const Result<agent::FetchResult>& result) { OnFetched(active, result); });
}

// What the reused tokens would have taken at the pace of this conversation's prompts until now,
// less what moving them took.
double DecodeWorker::SavedMs(const Active& active, const agent::FetchResult& result) {
  if (result.reused_tokens == 0 || active.computed_tokens == 0) return 0;
  const double per_token = active.compute_ms / static_cast<double>(active.computed_tokens);
  return result.reused_tokens * per_token - result.reuse_ms;
}

void DecodeWorker::OnFetched(const ActivePtr& active, const Result<agent::FetchResult>& result) {
  if (active->over) return;
  WithdrawKept(active);
  if (!result.has_value()) return End(active, result.error());
  const agent::LoadResult& load = result->load;
  active->transfer = {.path = load.own.path,
                      .prefill = result->prefill,
                      .retries = result->retries,
                      .bytes_pulled = load.own.bytes,
                      .prefix_bytes_pulled = load.prefix_bytes,
                      .prefix_hit = load.prefix_hit,
                      .computed_tokens = result->computed_tokens,
                      .reused_tokens = result->reused_tokens,
                      .reuse_bytes = result->reuse_bytes,
                      .prefill_ms = result->queue_ms + result->compute_ms,
                      .reuse_ms = result->reuse_ms,
                      .saved_ms = SavedMs(*active, *result),
                      .handshake_ms = load.own.handshake_ms,
                      .pull_ms = std::min(load.own.pull_ms, result->wait_ms)};
  CountTransfer(active->transfer);
  engine_.Begin(active->number,
                {.prefix = load.prefix,
                 .cast = load.cast,
                 .keep = engine_.options().conversation_blocks > 0 && !load.cast,
                 .compute_ms = active->compute_ms + result->compute_ms,
                 .computed_tokens = active->computed_tokens + result->computed_tokens});
}

void DecodeWorker::CountTransfer(const TransferSummary& transfer) {
  agent::Counters& counters = agent_.counters();
  const std::string path = "kvrelay_pull_bytes_total{path=\"" + transfer.path + "\",kind=";
  counters.Add(path + "\"suffix\"}", static_cast<double>(transfer.bytes_pulled));
  if (transfer.prefix_bytes_pulled > 0) {
    counters.Add(path + "\"prefix\"}", static_cast<double>(transfer.prefix_bytes_pulled));
  }
  counters.Add("kvrelay_pull_seconds_sum", transfer.pull_ms / 1000);
  counters.Add("kvrelay_pull_seconds_count");
}

void DecodeWorker::OnTokens(const ActivePtr& active, const std::vector<uint32_t>& ids) {
  if (active->over) return;
  active->generated += ids.size();
  proto::GenerateReply reply;
  reply.token_ids = ids;
  reply.text = active->text.Add(ids);
  active->responder->Reply(proto::Encode(reply), true);
}

void DecodeWorker::OnDone(const ActivePtr& active, const Outcome& outcome) {
  if (active->over) return;
  if (!outcome.status.ok()) return End(active, outcome.status);
  active->over = true;
  proto::GenerateReply reply;
  reply.text = active->text.Finish();
  reply.summary_json = SummaryJson(active->request_id, outcome, active->transfer);
  active->responder->Reply(proto::Encode(reply), false);
  requests_.erase(active->number);

  const TransferSummary& transfer = active->transfer;
  const double ttft = ToMillis(outcome.prompt_done - outcome.submitted);
  agent::Counters& counters = agent_.counters();
  counters.Add("kvrelay_requests_total{role=\"decode\",outcome=\"ok\"}");
  const auto stage = [&counters](const std::string& name, double ms) {
    counters.Add("kvrelay_ttft_seconds_sum{stage=\"" + name + "\"}", ms / 1000);
  };
  stage("prefill", transfer.prefill_ms);
  stage("handshake", transfer.handshake_ms);
  stage("pull", transfer.pull_ms);
  stage("total", ttft);
  counters.Add("kvrelay_ttft_seconds_count");
  LOG(INFO) << "request " << active->request_id << ": " << outcome.prompt_tokens << " + "
            << active->generated << " tokens, " << transfer.path << " from " << transfer.prefill
            << ", " << transfer.bytes_pulled << " + " << transfer.prefix_bytes_pulled
            << " prefix bytes, " << transfer.reused_tokens << " tokens reused, prefill "
            << transfer.prefill_ms << " ms, handshake " << transfer.handshake_ms << " ms, pull "
            << transfer.pull_ms << " ms, first token " << ttft << " ms, "
            << FinishReasonName(outcome.reason);
}

void DecodeWorker::End(const ActivePtr& active, const Status& status) {
  if (active->over) return;
  active->over = true;
  if (const auto fetch = active->fetch.lock()) fetch->Cancel(status);
  WithdrawKept(active);
  engine_.End(active->number, status);
  active->responder->Fail(status);
  requests_.erase(active->number);
  agent_.counters().Add("kvrelay_requests_total{role=\"decode\",outcome=\"" +
                        std::string(CodeName(status.code())) + "\"}");
  LOG(INFO) << "request " << active->request_id << ": ended after " << active->generated
            << " tokens: " << status.ToString();
}

void DecodeWorker::OnCancelRequest(std::string_view body, const agent::ResponderPtr& responder) {
  const auto cancel = agent::DecodeRequest<proto::CancelRequest>(agent_.env(), body);
  if (!cancel.has_value()) return responder->Fail(cancel.error());
  std::vector<ActivePtr> named;
  for (const auto& [number, active] : requests_) {
    if (active->request_id == cancel->request_id) named.push_back(active);
  }
  if (named.empty()) {
    return responder->Fail({Code::kNotFound, "no request " + cancel->request_id + " is running"});
  }
  for (const ActivePtr& active : named) End(active, {Code::kCancelled, "cancelled by name"});
  responder->Reply(proto::Encode(proto::Empty{}), false);
}

}  // namespace kvrelay::engine
