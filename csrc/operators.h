// The namespace of the operators in torch.ops. kernel-builder, which builds for the Kernel Hub, gives each build one of
// its own, so that several can be loaded beside each other and beside the package.
#pragma once

#if defined(CPU_KERNEL) || defined(CUDA_KERNEL)
#define SINKATTN_OPERATORS TORCH_EXTENSION_NAME
#else
#define SINKATTN_OPERATORS sinkattn
#endif
