#include "tests/integration/failure_story.h"

#include "proto/codec.h"

namespace kvrelay::integration {

Args FailureStory::Ask(size_t prompt_tokens, int new_tokens, int number) {
  const std::string day = std::to_string(number);
  std::string text = "On day " + day + " the word of the LORD came unto me, saying,";
  while (text.size() < prompt_tokens) {
    text += " Son of man, speak unto the children of thy people, and say unto them.";
  }
  text.resize(prompt_tokens);
  return {"--prompt=" + text, "--max_new_tokens=" + std::to_string(new_tokens), "--ignore_eos"};
}

RunningCli FailureStory::StartGenerate(const Daemon& decode, const Args& ask, const Args& more) {
  Args args = {"generate", "--json", "--decode=" + decode.endpoint()};
  args.insert(args.end(), ask.begin(), ask.end());
  args.insert(args.end(), more.begin(), more.end());
  return StartCli(args);
}

CliResult FailureStory::RunGenerate(const Daemon& decode, const Args& ask, const Args& more) {
  return StartGenerate(decode, ask, more).Wait();
}

std::vector<uint32_t> FailureStory::RightAnswer(const Args& ask) {
  std::vector<uint32_t>& answer = answers_[ask];
  if (answer.empty()) {
    Args args = ask;
    args.emplace_back("--threads=1");  // many threads on few cores wait for each other
    answer = GenerateLocal(args);
  }
  return answer;
}

void FailureStory::ExpectRightAnswer(const CliResult& result, const Args& ask) {
  ASSERT_EQ(result.exit_code, 0) << result.out << result.err;
  const Json json = result.json();
  ASSERT_TRUE(json.is_object());
  EXPECT_EQ(json["token_ids"].get<std::vector<uint32_t>>(), RightAnswer(ask)) << result.out;
}

void FailureStory::ExpectFailure(const CliResult& result, int exit_code, const std::string& code) {
  EXPECT_EQ(result.exit_code, exit_code) << result.out << result.err;
  const Json json = result.json();
  ASSERT_TRUE(json.is_object() && json.contains("error")) << result.out;
  EXPECT_EQ(json["error"]["code"], code) << result.out;
}

std::string FailureStory::Message(const CliResult& result) {
  const Json json = result.json();
  return json.is_object() && json.contains("error") ? json["error"].value("message", "") : "";
}

std::string FailureStory::Description(const Daemon& daemon) {
  auto client = clients_.find(daemon.pid());
  if (client == clients_.end()) {
    auto connected = agent::Client::Connect(daemon.endpoint());
    if (!connected) return "";
    client = clients_.emplace(daemon.pid(), std::move(*connected)).first;
  }
  const auto body = client->second.Call(proto::Type::kDescribe, proto::Encode(proto::Describe{}),
                                        std::chrono::seconds(5));
  if (!body) return "";
  const auto reply = proto::Decode<proto::DescribeReply>(*body);
  return reply ? reply->json : "";
}

Json FailureStory::Look(const Daemon& daemon) {
  const Json look = Json::parse(Description(daemon), nullptr, false);
  return look.is_object() ? look : Json(nullptr);
}

double FailureStory::Count(const Daemon& daemon, const std::string& counter) {
  const Json look = Look(daemon);
  double sum = 0;
  if (!look.is_object()) return sum;
  for (const auto& [name, value] : look["counters"].items()) {
    if (name.starts_with(counter)) sum += value.get<double>();
  }
  return sum;
}

bool FailureStory::HasLease(const Daemon& prefill, const std::string& state) {
  const Json look = Look(prefill);
  if (!look.is_object()) return false;
  for (const Json& lease : look["leases"]) {
    if (lease["state"] == state) return true;
  }
  return false;
}

std::string FailureStory::ReadsFrom(const Daemon& decode) {
  static constexpr std::string_view kReading = "\"state\":\"reading\",\"peer\":\"";
  const std::string text = Description(decode);
  const size_t at = text.find(kReading);
  if (at == std::string::npos) return "";
  const size_t begin = at + kReading.size();
  return text.substr(begin, text.find('"', begin) - begin);
}

void FailureStory::ExpectServes(const Daemon& decode, int number) {
  const Args ask = Ask(50, 8, number);
  ExpectRightAnswer(RunGenerate(decode, ask), ask);
}

}  // namespace kvrelay::integration
