// kvrelay keygen: a key pair for a daemon or a person.
#include <nlohmann/json.hpp>

#include "tools/common/exit_code.h"
#include "tools/common/keys.h"
#include "tools/common/output.h"
#include "tools/common/start.h"
#include "tools/kvrelay/command.h"

namespace kvrelay::tools {

int KeygenCommand(CommandArgs args) {
  std::string path;
  bool json = false;
  FlagSet flags(
      "kvrelay keygen FILE [flags]",
      "Writes a new key pair to FILE, which only its owner can read, and prints the public key:\n"
      "a line for the --allowed_keys of others, and what stands behind the # of its daemon's "
      "endpoint.",
      "kvrelay keygen prefill.key");
  flags.Argument("FILE", &path, "of the key pair; it must not exist yet");
  flags.Switch("json", &json, "one object on stdout");
  if (const auto done = ParseOrFinish(flags, args)) return *done;

  const Result<transport::CurveKey> key = WriteNewKeyFile(path);
  if (!key) {
    ReportFailure(flags.program(), key.error(), "", json);
    return ExitCodeOf(key.error().code());
  }
  const std::string text = transport::KeyToText(*key);
  WriteOut(
      json ? nlohmann::ordered_json{{"schema", 1}, {"public_key", text}, {"key_file", path}}.dump(
                 -1, ' ', false, nlohmann::json::error_handler_t::replace) +
                 "\n"
           : text + "\n");
  return kExitOk;
}

}  // namespace kvrelay::tools
