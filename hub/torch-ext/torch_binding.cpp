// Lets Python import the library of a build of kernel-builder, which writes registration.h. The operators are registered
// in csrc.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
