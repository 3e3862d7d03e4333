// Tensors of Python frameworks by DLPack's exchange table (dlpack 1.2+, `__dlpack_c_exchange_api__`): pointers, shapes and
// types in some tens of nanoseconds, with nothing of the framework compiled in. The structures are the standard's.
#pragma once
#include <cstdint>

namespace deepthin::dlpack {

struct Device {
    int32_t type, id;
};
constexpr int32_t CPU = 1;

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};
constexpr DataType FLOAT32{2, 32, 1};
constexpr uint8_t INTEGER = 0;  // signed

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t *shape, *strides;  // in elements; no strides: row-major
    uint64_t byte_offset;

    float* floats() const { return reinterpret_cast<float*>(static_cast<char*>(data) + byte_offset); }
    bool is_float32_on_cpu() const {
        return device.type == CPU && dtype.code == FLOAT32.code && dtype.bits == FLOAT32.bits && dtype.lanes == 1;
    }
    bool is_row_major() const {
        int64_t expected = 1;
        for (int32_t i = ndim - 1; i >= 0 && strides; i--) {
            if (shape[i] != 1 && strides[i] != expected) return false;
            expected *= shape[i];
        }
        return true;
    }
};

struct Version {
    uint32_t major, minor;
};

struct ManagedTensor;

struct ExchangeApi {
    Version version;
    ExchangeApi* previous;
    int (*allocate)(Tensor* prototype, ManagedTensor** out, void* context,
                    void (*fail)(void* context, const char* kind, const char* message));
    int (*managed_from_python)(void* object, ManagedTensor** out);
    int (*to_python)(ManagedTensor*, void** object);  // takes ownership of the tensor
    int (*from_python)(void* object, Tensor* out);    // a view that lives as long as the object; null: not offered
    int (*current_stream)(int32_t device_type, int32_t device, void** stream);
};

struct ManagedTensor {
    Version version;
    void* manager;
    void (*deleter)(ManagedTensor*);
    uint64_t flags;
    Tensor tensor;
};

}  // namespace deepthin::dlpack
