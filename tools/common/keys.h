// Key files: who a program is to its peers, and which peers it talks to.
//
// A key file, made by `kvrelay keygen`, can be read by its owner alone (mode 0600) and has one
// line, "secret KEY". A file of allowed keys has one public key a line, and behind it whatever
// tells whose it is. In both # begins a comment.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "base/status.h"
#include "tools/common/endpoint.h"
#include "tools/common/flags.h"
#include "transport/curve.h"

namespace kvrelay::tools {

// Writes a new key pair to a file that does not exist yet; returns the public key.
Result<transport::CurveKey> WriteNewKeyFile(const std::string& path);

// --key_file and --allowed_keys of everything that talks to daemons.
struct KeyFlags {
  std::string key_file;      // empty: no keys
  std::string allowed_keys;  // empty: our own, and those of the endpoints that were named by hand

  void Declare(FlagSet& flags);
  // Null without a key file. `named`: the endpoints that were named by hand; with a key file each
  // must have a key, one that is allowed, without one none may. kInvalidArgument names the flag or
  // the file, its line and what is wrong there.
  Result<std::shared_ptr<const transport::CurveIdentity>> Load(
      std::span<const Endpoint> named) const;
};

}  // namespace kvrelay::tools
