/* Where a Cortex-M4 begins: its vectors, the floating-point unit, variables, then _start:
 * newlib's, which calls main, or that of keywords.c. */
#include <stdint.h>

extern void _start(void); /* clears memory, calls main */
extern uint32_t stack_end[], data_begin[], data_end[], data_load[]; /* of mps2.ld */

static void fault(void) { /* ends QEMU by semihosting: SYS_EXIT, no application exit */
    register uint32_t operation __asm__("r0") = 0x18, reason __asm__("r1") = 0x20023;
    __asm__ volatile("bkpt 0xab" : : "r"(operation), "r"(reason));
    for (;;) {
    }
}

static void reset(void) {
    volatile uint32_t *const access = (volatile uint32_t *)0xE000ED88u; /* CPACR */
    *access |= 0xFu << 20;
    __asm__ volatile("dsb\n\tisb");
    for (uint32_t *to = data_begin, *from = data_load; to < data_end;) *to++ = *from++;
    _start();
}

__attribute__((section(".vectors"), used)) static const struct {
    uint32_t *stack;
    void (*handlers[15])(void);
} vectors = {stack_end, {reset, fault, fault, fault, fault, fault, 0, 0, 0, 0, fault, fault, 0, fault, fault}};
