// What a benchmark of two processes needs: pipes between them, and the end when one fails.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "transport/transport.h"

namespace kvrelay::bench {

inline double Seconds(std::chrono::steady_clock::time_point since) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
}

inline void Check(bool ok, const std::string& what) {
  if (ok) return;
  std::cerr << program_invocation_short_name << ": " << what << "\n";
  _exit(1);
}

template <typename T>
T Must(Result<T> result) {
  Check(result.has_value(), result.has_value() ? "" : result.error().ToString());
  return std::move(*result);
}

inline void WriteAll(int fd, const void* data, size_t bytes) {
  for (const char* at = static_cast<const char*>(data); bytes > 0;) {
    const ssize_t n = write(fd, at, bytes);
    Check(n > 0, "the other process has ended");
    at += n;
    bytes -= static_cast<size_t>(n);
  }
}

inline void ReadAll(int fd, void* data, size_t bytes) {
  for (char* at = static_cast<char*>(data); bytes > 0;) {
    const ssize_t n = read(fd, at, bytes);
    Check(n > 0, "the other process has ended");
    at += n;
    bytes -= static_cast<size_t>(n);
  }
}

inline void SendSpec(int fd, const transport::PeerSpec& spec) {
  const uint64_t header[] = {spec.incarnation, spec.address.size(), spec.region_bytes[0],
                             spec.region_bytes[1]};
  WriteAll(fd, header, sizeof(header));
  WriteAll(fd, spec.address.data(), spec.address.size());
}

inline transport::PeerSpec ReceiveSpec(int fd) {
  uint64_t header[4];
  ReadAll(fd, header, sizeof(header));
  transport::PeerSpec spec{"peer", std::string(header[1], '\0'), {header[2], header[3]}, header[0]};
  ReadAll(fd, spec.address.data(), spec.address.size());
  return spec;
}

inline void SendText(int fd, const std::string& text) {
  const uint64_t bytes = text.size();
  WriteAll(fd, &bytes, sizeof(bytes));
  WriteAll(fd, text.data(), bytes);
}

inline std::string ReceiveText(int fd) {
  uint64_t bytes = 0;
  ReadAll(fd, &bytes, sizeof(bytes));
  std::string text(bytes, '\0');
  ReadAll(fd, text.data(), bytes);
  return text;
}

// A TCP connection over loopback: {the listener's side, the connecting side}.
inline std::pair<int, int> TcpPair() {
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  Check(bind(listener, reinterpret_cast<sockaddr*>(&address), length) == 0 &&
            listen(listener, 1) == 0 &&
            getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length) == 0,
        "no TCP socket on loopback");
  const int connected = socket(AF_INET, SOCK_STREAM, 0);
  Check(connect(connected, reinterpret_cast<sockaddr*>(&address), length) == 0,
        "cannot connect over loopback");
  const int accepted = accept(listener, nullptr, nullptr);
  close(listener);
  return {accepted, connected};
}

struct Rates {
  double min = 0;
  double median = 0;
  double max = 0;
};

inline Rates Summarise(std::vector<double> values) {
  if (values.empty()) return {};
  std::ranges::sort(values);
  return {values.front(), values[values.size() / 2], values.back()};
}

}  // namespace kvrelay::bench
