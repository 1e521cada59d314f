// What the stories about failures share: prompts with known answers, and quick looks into a daemon.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "agent/client.h"
#include "tests/integration/harness.h"

namespace kvrelay::integration {

class FailureStory : public Story {
 protected:
  // Computes one prompt token per step: a prompt of some hundred tokens takes a second or more.
  static inline const std::string kSlowPrefill = "--prefill_chunk=1";

  // Flags of a prompt of about `prompt_tokens` tokens; another text for each `number`.
  static Args Ask(size_t prompt_tokens, int new_tokens, int number = 0);
  // `kvrelay generate --json` on the decode daemon, in work.
  RunningCli StartGenerate(const Daemon& decode, const Args& ask, const Args& more = {});
  CliResult RunGenerate(const Daemon& decode, const Args& ask, const Args& more = {});

  // Exit 0 and the ids that one process alone computes.
  void ExpectRightAnswer(const CliResult& result, const Args& ask);
  // That exit code, and one JSON error with this code.
  void ExpectFailure(const CliResult& result, int exit_code, const std::string& code);
  static std::string Message(const CliResult& result);

  // DESCRIBE from this process: some milliseconds, where `kvrelay inspect` starts a program.
  // Null, and no failure, when nobody answers.
  Json Look(const Daemon& daemon);
  // Sum of the counters whose names begin so.
  double Count(const Daemon& daemon, const std::string& counter);
  // At least one lease is in this state ("claimed").
  bool HasLease(const Daemon& prefill, const std::string& state);
  // The prefill daemon that one of its ranks reads from now; empty when none does.
  std::string ReadsFrom(const Daemon& decode);

  // A question asked and answered right: the daemons work.
  void ExpectServes(const Daemon& decode, int number = 900);

 private:
  std::vector<uint32_t> RightAnswer(const Args& ask);

  std::string Description(const Daemon& daemon);

  std::map<pid_t, agent::Client> clients_;
  std::map<Args, std::vector<uint32_t>> answers_;
};

}  // namespace kvrelay::integration
