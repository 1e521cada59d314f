// A program outside the project: includes and links what `cmake --install` left behind.
#include <iostream>

#include "base/build_info.h"
#include "transport/transport.h"

int main() {
  kvrelay::transport::Options options;
  // Linked, not only included; without regions there is nothing to serve, whatever the answer.
  const bool made = kvrelay::transport::CreateMapped(options).has_value();
  std::cout << kvrelay::VersionText() << (made ? "mapped\n" : "not mapped\n");
}
