#include "tests/integration/generator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <future>
#include <string_view>
#include <thread>
#include <utility>

#include "agent/client.h"
#include "proto/codec.h"
#include "tests/common/slowness.h"

namespace kvrelay::integration {
namespace {

constexpr std::string_view kPassage =
    "In the beginning God created the heaven and the earth. And the earth was without form, and "
    "void; and darkness was upon the face of the deep. And the Spirit of God moved upon the face "
    "of the waters. And God said, Let there be light: and there was light. And God saw the light, "
    "that it was good: and God divided the light from the darkness. And God called the light Day, "
    "and the darkness he called Night. And the evening and the morning were the first day. ";

}  // namespace

Result<Reply> Ask(const std::string& endpoint, proto::Generate request) {
  KVRELAY_ASSIGN_OR_RETURN(agent::Client client, agent::Client::Connect(endpoint));
  Reply reply;
  const auto take = [&reply](std::string_view body) -> Status {
    KVRELAY_ASSIGN_OR_RETURN(const auto part, proto::Decode<proto::GenerateReply>(body));
    reply.token_ids.insert(reply.token_ids.end(), part.token_ids.begin(), part.token_ids.end());
    if (!part.summary_json.empty()) reply.summary = nlohmann::json::parse(part.summary_json);
    return Status::Ok();
  };
  KVRELAY_ASSIGN_OR_RETURN(const std::string last,
                           client.Stream(proto::Type::kGenerate, proto::Encode(request),
                                         Millis(request.timeout_ms + 2000), take));
  KVRELAY_RETURN_IF_ERROR(take(last));
  return reply;
}

std::vector<Result<Reply>> AskAll(const std::string& endpoint,
                                  const std::vector<proto::Generate>& requests, size_t at_once) {
  std::vector<Result<Reply>> replies(requests.size(), Error(Code::kInternal, "not asked"));
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (size_t t = 0; t < std::min(at_once, requests.size()); ++t) {
    threads.emplace_back([&] {
      for (size_t i = next++; i < requests.size(); i = next++) {
        replies[i] = Ask(endpoint, requests[i]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return replies;
}

Reference::Reference(const std::string& model_dir) {
  engine::EngineOptions options;
  options.model_dir = model_dir;
  options.relay = engine::RelayMode::kOff;
  auto engine = engine::Engine::Create(options);
  if (!engine.has_value()) {
    ADD_FAILURE() << engine.error().ToString();
    return;
  }
  engine_ = std::move(*engine);
}

std::vector<std::vector<uint32_t>> Reference::Generate(
    const std::vector<proto::Generate>& requests) {
  std::vector<std::vector<uint32_t>> ids(requests.size());
  std::vector<std::promise<Status>> done(requests.size());
  for (size_t i = 0; i < requests.size(); ++i) {
    engine::Request local;
    local.system_ids = requests[i].system_ids;
    local.token_ids = requests[i].token_ids;
    local.max_new_tokens = requests[i].max_new_tokens;
    local.ignore_eos = requests[i].ignore_eos;
    local.on_tokens = [&ids, i](engine::RequestNumber, std::span<const uint32_t> more) {
      ids[i].insert(ids[i].end(), more.begin(), more.end());
    };
    local.on_done = [&done, i](engine::RequestNumber, const engine::Outcome& outcome) {
      done[i].set_value(outcome.status);
    };
    const auto number = engine_->Submit(std::move(local));
    if (!number.has_value()) done[i].set_value(number.error());
  }
  for (std::promise<Status>& promise : done) {
    const Status status = promise.get_future().get();
    EXPECT_TRUE(status.ok()) << status.ToString();
  }
  return ids;
}

std::vector<uint32_t> Text(size_t length, size_t salt) {
  std::vector<uint32_t> ids;
  for (size_t i = 0; i < length; ++i) {
    ids.push_back(3 + static_cast<uint8_t>(kPassage[(salt * 37 + i) % kPassage.size()]));
  }
  return ids;
}

proto::Generate Greedy(std::vector<uint32_t> system_ids, std::vector<uint32_t> token_ids,
                       uint32_t max_new_tokens) {
  proto::Generate request;
  request.system_ids = std::move(system_ids);
  request.token_ids = std::move(token_ids);
  request.max_new_tokens = max_new_tokens;
  request.ignore_eos = true;
  request.timeout_ms = 120'000 * tests::Slowness();
  return request;
}

std::vector<proto::Generate> GreedyOfLengths(std::span<const size_t> lengths, size_t system_length,
                                             uint32_t max_new_tokens) {
  std::vector<proto::Generate> requests;
  for (size_t i = 0; i < lengths.size(); ++i) {
    requests.push_back(Greedy(Text(system_length, 3), Text(lengths[i], i + 5), max_new_tokens));
  }
  return requests;
}

}  // namespace kvrelay::integration
