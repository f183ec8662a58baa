// require(condition, message parts...): throws std::runtime_error, which Python sees as RuntimeError with only this
// message.
#pragma once

#include <sstream>
#include <stdexcept>

namespace sinkattn {

template <typename... Parts>
inline void require(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace sinkattn
