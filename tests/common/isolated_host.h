// A host of its own as far as processes can tell: another network, other mounts and shared memory,
// as a container has them. Needs root, and the commands ip and nsenter.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "base/unique_fd.h"

namespace kvrelay {

// Held open by a process that does nothing, and gone with it and those that entered. 64 MiB of
// /dev/shm, and a /run that nobody shares; all other folders are everybody's.
class IsolatedHost {
 public:
  // Null when this machine does not let us.
  static std::unique_ptr<IsolatedHost> Create() {
    int ready[2];
    if (pipe2(ready, O_CLOEXEC) != 0) return nullptr;
    const UniqueFd from(ready[0]);
    UniqueFd to(ready[1]);
    const pid_t pid = fork();
    if (pid == 0) Hold(to.get());
    if (pid < 0) return nullptr;
    std::unique_ptr<IsolatedHost> host(new IsolatedHost(pid));
    to.Reset();
    char yes = 0;
    return read(from.get(), &yes, 1) == 1 ? std::move(host) : nullptr;
  }
  ~IsolatedHost() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  IsolatedHost(const IsolatedHost&) = delete;
  IsolatedHost& operator=(const IsolatedHost&) = delete;

  // The interfaces of a cable between two hosts, and their addresses.
  static constexpr const char* kLeftInterface = "kvtest0";
  static constexpr const char* kLeftAddress = "10.213.7.1";
  static constexpr const char* kRightInterface = "kvtest1";
  static constexpr const char* kRightAddress = "10.213.7.2";

  // A cable between the two, left end here. Waits for the signal on it, at most 5 s.
  bool Join(const IsolatedHost& other) const {
    return Run("ip link add " + std::string(kLeftInterface) + " type veth peer name " +
               kRightInterface + " netns " + std::to_string(other.pid_)) &&
           Configure(kLeftInterface, kLeftAddress) &&
           other.Configure(kRightInterface, kRightAddress) && HasSignal(kLeftInterface) &&
           other.HasSignal(kRightInterface);
  }
  // Gives an interface its address and turns it on.
  bool Configure(const std::string& interface, const std::string& address) const {
    return Run("ip link set lo up") && Run("ip address add " + address + "/24 dev " + interface) &&
           Run("ip link set " + interface + " up");
  }
  // The kernel notices half a second late, and UCX takes no interface without. At most 5 s.
  bool HasSignal(const std::string& interface) const {
    const std::string file =
        "/proc/" + std::to_string(pid_) + "/root/sys/class/net/" + interface + "/operstate";
    for (int tries = 0; tries < 500; ++tries) {
      std::string state;
      std::ifstream(file) >> state;
      if (state == "up" || state == "unknown") return true;  // tap interfaces never know
      usleep(10'000);
    }
    return false;
  }
  // A command in this host's network, silently; true when it went well.
  bool Run(const std::string& command) const {
    const std::string line =
        "nsenter --target " + std::to_string(pid_) + " --net " + command + " >/dev/null 2>&1";
    return std::system(line.c_str()) == 0;
  }

  // In front of a command line: runs it there.
  std::vector<std::string> Launcher() const {
    return {"/usr/bin/nsenter", "--target", std::to_string(pid_), "--net", "--mount", "--ipc"};
  }
  // Moves the calling process there; it must have one thread.
  static bool Enter(pid_t pid) {
    const std::string folder = "/proc/" + std::to_string(pid) + "/ns/";
    const UniqueFd net(open((folder + "net").c_str(), O_RDONLY | O_CLOEXEC));
    const UniqueFd ipc(open((folder + "ipc").c_str(), O_RDONLY | O_CLOEXEC));
    const UniqueFd mounts(open((folder + "mnt").c_str(), O_RDONLY | O_CLOEXEC));
    return setns(net.get(), CLONE_NEWNET) == 0 && setns(ipc.get(), CLONE_NEWIPC) == 0 &&
           setns(mounts.get(), CLONE_NEWNS) == 0;
  }
  // Moves the calling thread into this host's network.
  bool EnterNetwork() const {
    const std::string file = "/proc/" + std::to_string(pid_) + "/ns/net";
    const UniqueFd net(open(file.c_str(), O_RDONLY | O_CLOEXEC));
    return setns(net.get(), CLONE_NEWNET) == 0;
  }
  pid_t pid() const { return pid_; }

  // Bytes that came over one of its interfaces.
  uint64_t ReceivedBytes(const std::string& interface) const {
    std::ifstream file("/proc/" + std::to_string(pid_) + "/net/dev");
    for (std::string line; std::getline(file, line);) {
      const size_t at = line.find(interface + ":");
      if (at == std::string::npos) continue;
      std::istringstream in(line.substr(at + interface.size() + 1));
      uint64_t bytes = 0;
      in >> bytes;
      return bytes;
    }
    return 0;
  }

 private:
  explicit IsolatedHost(pid_t pid) : pid_(pid) {}

  // What the holding process does: between fork and its end nothing but system calls.
  [[noreturn]] static void Hold(int ready) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    const bool isolated = unshare(CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC) == 0 &&
                          mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
                          mount("tmpfs", "/dev/shm", "tmpfs", 0, "size=64m") == 0 &&
                          mount("tmpfs", "/run", "tmpfs", 0, "size=1m") == 0 &&
                          mount("sysfs", "/sys", "sysfs", MS_RDONLY, nullptr) == 0;
    if (!isolated || write(ready, "y", 1) != 1) _exit(1);
    close(ready);
    while (true) pause();
  }

  const pid_t pid_;
};

}  // namespace kvrelay
