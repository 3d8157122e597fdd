// What torch's C++ asks about the current CUDA device, which a build for CPUs lacks: there is one, number 0.
#include <c10/core/impl/DeviceGuardImplInterface.h>

struct OnlyOneDevice : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return c10::Device(c10::DeviceType::CUDA, 0); }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
};

static OnlyOneDevice guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
