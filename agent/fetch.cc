#include "agent/fetch.h"

#include <algorithm>
#include <utility>

#include "proto/codec.h"

namespace kvrelay::agent {
namespace {

constexpr Duration kPause =
    Millis(100);  // times the number of tries, before the same worker is asked again

// The request passed this engine's own checks. What is invalid after that is between the worker and
// us, and no usage of the client's.
Status NotTheClientsFault(const Status& status) {
  if (status.code() != Code::kInvalidArgument) return status;
  return {Code::kIncompatible, status.message()};
}

// Another worker may do better.
bool IsTheWorkersFault(const Status& status) {
  return status.code() == Code::kIncompatible || status.code() == Code::kRefused;
}

}  // namespace

Fetch::Fetch(ReaderContext& context, PrefixTable& prefixes, PrefillPool& pool, FetchOptions options,
             FetchRequest request, std::function<void(Result<FetchResult>)> finished)
    : context_(context),
      prefixes_(prefixes),
      pool_(pool),
      options_(options),
      request_(std::move(request)),
      finished_(std::move(finished)) {}

uint32_t Fetch::tokens() const {
  return static_cast<uint32_t>(request_.system_ids.size() + request_.token_ids.size());
}

void Fetch::Start() {
  context_.under_way.insert(shared_from_this());
  deadline_timer_ = context_.env.clock.CallAt(request_.deadline, [weak = weak_from_this()] {
    const auto self = weak.lock();
    if (!self) return;
    self->deadline_timer_ = 0;
    self->Cancel({Code::kDeadlineExceeded, "the request's deadline passed"});
  });
  context_.env.clock.CallAfter({}, [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->Try();
  });
}

void Fetch::Try() {
  if (!cancelled_.ok()) return Finish(Error(cancelled_));
  Env& env = context_.env;
  const auto endpoint = pool_.Pick(tokens(), tried_);
  if (!endpoint.has_value()) {
    const Status none = pool_.WhyNone();
    if (failure_.ok()) return Finish(Error(none));
    return Finish(Error(failure_.code(), none.message() + "; last: " + failure_.ToString()));
  }
  ++tries_;
  trying_ = true;
  computed_ = false;
  loaded_ = false;
  failure_ = Status::Ok();
  endpoint_ = *endpoint;
  tried_.insert(endpoint_);
  const auto left =
      static_cast<uint32_t>(std::max<double>(1, ToMillis(request_.deadline - env.clock.Now())));
  const proto::Prefill prefill{.request_id = request_.request_id,
                               .system_ids = request_.system_ids,
                               .token_ids = request_.token_ids,
                               .prefix_tokens = request_.prefix_tokens,
                               .model = context_.model,
                               .reuse = request_.reuse,
                               .timeout_ms = left};
  call_ = env.rpc.Call(endpoint_, proto::Type::kPrefill, proto::Encode(prefill), request_.deadline,
                       [weak = weak_from_this()](const Result<std::string>& body, bool more) {
                         if (const auto self = weak.lock()) self->OnPrefillReply(body, more);
                       });
  timer_ = env.clock.CallAfter(options_.accept_timeout, [weak = weak_from_this()] {
    const auto self = weak.lock();
    if (!self) return;
    self->timer_ = 0;
    self->EndTry(
        {Code::kPeerUnreachable,
         "prefill " + self->endpoint_ + " did not accept the request in " +
             std::to_string(static_cast<int64_t>(ToMillis(self->options_.accept_timeout))) +
             " ms"});
  });
}

Status Fetch::CheckTicket(const proto::Ticket& ticket) const {
  const std::string who = "prefill " + endpoint_;
  if (ticket.model != context_.model) {
    return {Code::kIncompatible,
            who + " has model " + ticket.model.ToHex() + ", here it is " + context_.model.ToHex()};
  }
  if (ticket.front != endpoint_) {  // a hint, not an order: we talk to whom we were configured to
    return {Code::kRefused, who + " sent a ticket of " + ticket.front};
  }
  const uint32_t shared = ticket.prefixes.empty() ? 0 : ticket.prefixes.front().tokens;
  const ContentHash hash = ticket.prefixes.empty() ? ContentHash{} : ticket.prefixes.front().hash;
  const uint32_t first = ticket.prefixes.empty() ? 0 : ticket.prefixes.front().first_token;
  if (ticket.prefixes.size() > 1 || first != 0 || shared != request_.prefix_tokens ||
      hash != request_.prefix_hash || ticket.prompt.first_token != shared ||
      ticket.prompt.tokens != tokens() - shared || ticket.prompt.hash != request_.prompt_hash) {
    return {Code::kIncompatible, who + " sent a ticket for " +
                                     std::to_string(ticket.prompt.tokens) + " tokens behind " +
                                     std::to_string(shared) + " shared ones; the request has " +
                                     std::to_string(tokens() - request_.prefix_tokens) +
                                     " behind " + std::to_string(request_.prefix_tokens)};
  }
  return Status::Ok();
}

void Fetch::OnPrefillReply(const Result<std::string>& body, bool more) {
  if (!more) call_ = 0;
  if (!trying_) return;
  if (loaded_ && !body.has_value()) {  // the worker has nothing to give any more
    computed_at_ = context_.env.clock.Now();
    computed_ = true;
    return EndIfComplete();
  }
  const auto reply = body.has_value() ? proto::Decode<proto::PrefillReply>(*body)
                                      : Result<proto::PrefillReply>(tl::unexpected(body.error()));
  if (!reply.has_value()) return EndTry(reply.error().Wrap("prefill " + endpoint_));
  Env& env = context_.env;
  if (reply->accepted) {  // from here on a worker that hangs is noticed by its broken connection
    env.clock.Cancel(std::exchange(timer_, 0));
    return;
  }
  if (!load_ && !loaded_) {
    if (Status status = CheckTicket(reply->ticket); !status.ok()) return EndTry(status);
    load_ = std::make_shared<Load>(
        context_, prefixes_,
        LoadRequest{.ticket = reply->ticket,
                    .blocks = request_.blocks(),
                    .held_tokens = request_.held_tokens,
                    .priority = request_.priority,
                    .deadline = request_.deadline,
                    .prefix_names = request_.prefix_names},
        Load::Events{.finished =
                         [weak = weak_from_this()](const Result<LoadResult>& r) {
                           if (const auto self = weak.lock()) self->OnLoaded(r);
                         },
                     .drained =
                         [weak = weak_from_this()] {
                           if (const auto self = weak.lock()) self->OnDrained();
                         }});
    load_->Start();
    if (options_.stream) load_->SetReady();
  }
  if (reply->finished) OnComputed(*reply);
}

void Fetch::OnComputed(const proto::PrefillReply& reply) {
  Env& env = context_.env;
  computed_ = true;
  computed_at_ = env.clock.Now();
  result_.queue_ms = reply.queue_ms;
  result_.compute_ms = reply.compute_ms;
  result_.computed_tokens = reply.computed_tokens;
  result_.reused_tokens = reply.reused_tokens;
  result_.reuse_bytes = reply.reuse_bytes;
  result_.reuse_ms = reply.reuse_ms;
  if (loaded_) return EndIfComplete();
  timer_ = env.clock.CallAfter(options_.load_timeout, [weak = weak_from_this()] {
    const auto self = weak.lock();
    if (!self) return;
    self->timer_ = 0;
    self->EndTry({Code::kDeadlineExceeded,
                  "the pull from prefill " + self->endpoint_ + " took more than " +
                      std::to_string(static_cast<int64_t>(ToMillis(self->options_.load_timeout))) +
                      " ms"});
  });
  load_->SetReady();
}

void Fetch::OnLoaded(const Result<LoadResult>& result) {
  if (!trying_) return;
  if (!result.has_value()) return EndTry(result.error());
  result_.load = *result;
  loaded_ = true;
  EndIfComplete();
}

// The KV may be here before the prefill worker's last word, which has the times.
void Fetch::EndIfComplete() {
  if (!computed_ || !loaded_) return;
  result_.wait_ms = ToMillis(context_.env.clock.Now() - computed_at_);
  EndTry(Status::Ok());
}

void Fetch::EndTry(const Status& status) {
  Env& env = context_.env;
  trying_ = false;
  failure_ = NotTheClientsFault(status);
  env.clock.Cancel(std::exchange(timer_, 0));
  if (call_ != 0) env.rpc.Abandon(std::exchange(call_, 0));
  pool_.Done(endpoint_, tokens(), cancelled_.ok() ? failure_.code() : Code::kCancelled);
  if (load_) {
    load_->Cancel(failure_);  // no-op when it ended by itself; OnDrained goes on
    return;
  }
  env.clock.CallAfter({}, [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->AfterTry();
  });
}

void Fetch::OnDrained() {
  load_.reset();
  if (!trying_) AfterTry();
}

void Fetch::AfterTry() {
  if (failure_.ok()) {
    result_.prefill = endpoint_;
    result_.retries = static_cast<uint32_t>(tries_ - 1);
    return Finish(std::move(result_));
  }
  result_ = FetchResult{};
  if (!cancelled_.ok()) return Finish(Error(cancelled_));
  // Another worker at once; the same one again only after a breath, and only when it may do better.
  const bool other = tried_.size() < pool_.endpoints().size();
  const bool worth_it = IsRetryable(failure_.code()) || (other && IsTheWorkersFault(failure_));
  if (!worth_it || tries_ > options_.max_retries) return Finish(Error(failure_));
  context_.env.counters.Add("kvrelay_retries_total{reason=\"" +
                            std::string(CodeName(failure_.code())) + "\"}");
  context_.env.clock.CallAfter(other ? Duration{} : kPause * tries_, [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->Try();
  });
}

void Fetch::Cancel(const Status& why) {
  if (!finished_ || !cancelled_.ok()) return;
  cancelled_ = why;
  if (trying_) EndTry(why);
}

void Fetch::Finish(Result<FetchResult> result) {
  context_.under_way.erase(shared_from_this());
  context_.env.clock.Cancel(std::exchange(deadline_timer_, 0));
  const auto finished = std::exchange(finished_, nullptr);
  if (finished) finished(std::move(result));
}

}  // namespace kvrelay::agent
