// stdout carries results and nothing else; stderr carries the rest. A reader that went away (`|
// head -1`) kills nothing.
#pragma once

#include <string>
#include <string_view>

#include "base/status.h"

namespace kvrelay::tools {

// Call first in main. A closed pipe becomes an error of write, which WriteOut swallows; a standard
// stream that is not open at all becomes /dev/null, so that no socket or memory file gets its
// number.
void PrepareStandardStreams();

// Writes all of it to stdout at once, unbuffered. Any thread. What nobody reads any more is
// dropped.
void WriteOut(std::string_view text);
// The same to stderr, with a newline.
void WriteErrorLine(std::string_view text);

bool StdoutIsTerminal();
bool StderrIsTerminal();

// {"schema":1,"error":{"code":"kPeerUnreachable","message":"...","peer":"tcp://...","retryable":true}};
// `peer` is empty when the failure concerns none.
std::string ErrorJson(const Status& status, std::string_view peer);

// A command's failure, for whoever called it: with `json` one object on stdout, else one line on
// stderr that begins with the program's name.
void ReportFailure(std::string_view program, const Status& status, std::string_view peer,
                   bool json);

}  // namespace kvrelay::tools
