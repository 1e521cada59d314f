#include "engine/model_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace kvrelay::engine {

Result<RegularFile> OpenRegularFile(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) {
    const Code code =
        errno == ENOENT || errno == ENOTDIR ? Code::kNotFound : Code::kInvalidArgument;
    return Error(code, path + ": " + std::strerror(errno));
  }
  struct stat info = {};
  if (::fstat(fd.get(), &info) != 0 || !S_ISREG(info.st_mode)) {
    return Error(Code::kInvalidArgument, path + " is not a regular file");
  }
  return RegularFile{std::move(fd), static_cast<uint64_t>(info.st_size)};
}

Result<std::string> ReadTextFile(const std::string& path, uint64_t max_bytes) {
  KVRELAY_ASSIGN_OR_RETURN(const RegularFile file, OpenRegularFile(path));
  if (file.bytes > max_bytes) {
    return Error(Code::kInvalidArgument, path + " has " + std::to_string(file.bytes) +
                                             " bytes, at most " + std::to_string(max_bytes) +
                                             " are read");
  }
  std::string text(file.bytes, '\0');
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = ::read(file.fd.get(), text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Error(Code::kInvalidArgument, path + ": " + std::strerror(errno));
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  text.resize(done);
  return text;
}

}  // namespace kvrelay::engine
