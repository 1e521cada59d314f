// Anonymous files that others map: what host regions are made of.
#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"
#include "base/unique_fd.h"

namespace kvrelay {

// `bytes` of zeros that take no memory yet, CLOEXEC. `name` shows in /proc/*/maps.
Result<UniqueFd> MakeMemfd(uint64_t bytes, const std::string& name);

// What never changes from now on, besides the size.
enum class Sealed : uint8_t {
  kSize,          // pages may lose their memory and get it again (holes are punched)
  kSizeAndPages,  // nor is anything written but through mappings that exist
};
Status SealMemfd(int fd, Sealed what);
// Whether pages keep their memory: who maps the file may enter all of them into its page tables.
// Where they come and go, reading one without memory gives it some again.
bool KeepsPages(int fd);

// Another descriptor of the same file that can not write, for SCM_RIGHTS.
Result<UniqueFd> ReopenReadOnly(int fd);

// "<what>: <errno's text>"; kResourceExhausted for shortages of memory and descriptors.
Status SystemError(const std::string& what, int error);
// kResourceExhausted with the bytes asked and available.
Status NoMemory(const std::string& name, uint64_t bytes);

}  // namespace kvrelay
